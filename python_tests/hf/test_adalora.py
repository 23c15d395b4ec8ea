"""AdaLoRA in AlignTrainer, in its checkpoints, and between PEFT's folders and ours."""

import json
import warnings

import pytest
import torch
from accelerate import Accelerator
from hf.folders import assert_same_bits, logits, plain, state, trained
from hf.trainers import adapted, features, logged, trainer
from peft import AdaLoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import batch
from transformers import TrainerCallback

from align_ext import export_peft, load_adapter, replace_linear_with_align_lora, save_adapter
from align_ext.model.rank_allocation import TripletImportance, allocated_ranks, update_and_allocate
from align_ext.training import allocates_ranks
from align_ext.training.checkpoint import load_trained, save_trained

LAYERS = ["up_proj", "down_proj"]
STEPS = {"max_steps": 6, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "warmup_steps": 0}


def test_a_step_that_was_skipped_decides_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "optimizer_step_was_skipped", True)
    ran = trainer(tmp_path, adalora(), features(), **STEPS)
    ran.model.align_state.ranks = TripletImportance()  # of a training before this one
    ran.train()
    assert ran.model.align_state.ranks is None


class StopAt(TrainerCallback):
    """Ends a training after a step, its schedule that of the whole."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def adalora(**options):
    return adapted(architecture="adalora", **{"target_r": 2, "tinit": 1, "tfinal": 2} | options)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_trainer_allocates_once_a_step_on_its_whole_gradient(tmp_path, monkeypatch, accumulation):
    seen, inner = [], allocates_ranks.update_and_allocate

    def recorded(model, step, total):
        inner(model, step, total)
        gradient = model.model.layers[0].mlp.up_proj.adapter.lora_B.grad.clone()
        seen.append((step, total, sum(allocated_ranks(model).values()), gradient))

    monkeypatch.setattr(allocates_ranks, "update_and_allocate", recorded)
    parts = {"per_device_train_batch_size": 6 // accumulation, "gradient_accumulation_steps": accumulation}
    ran = trainer(tmp_path, adalora(align=None), features(), **STEPS, **parts)
    ran.train()
    layers = len(allocated_ranks(ran.model))
    assert [entry[:3] for entry in seen] == [
        (1, 6, 4 * layers), (2, 6, 2 * layers + int(2 * layers * (2 / 3) ** 3)),
        (3, 6, 2 * layers + int(2 * layers * (1 / 3) ** 3)), *((step, 6, 2 * layers) for step in (4, 5, 6)),
    ]  # fmt: skip
    assert len(set(allocated_ranks(ran.model).values())) > 1
    first = trainer(tmp_path, adalora(align=None), features(), **{**STEPS, "max_steps": 4})
    first.train()  # without accumulation: by the tokens of the whole step, the gradient is the same
    torch.testing.assert_close(seen[0][3], seen[6][3])
    for entry in logged(ran):
        whole = entry["lm_loss"] + 0.1 * entry["orth_loss"]
        assert entry["loss"] == pytest.approx(whole, rel=1e-5)


def test_a_schedule_that_outlasts_the_training_and_sharded_gradients_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"has 6 optimizer steps.*the ranks are final at step 8: leave total_step out"):
        trainer(tmp_path, adalora(total_step=10), features(), **STEPS).train()
    ran = trainer(tmp_path, adalora(), features(), **STEPS)
    ran.is_fsdp_enabled = True
    state = type("State", (), {"max_steps": 6, "global_step": 0})
    with pytest.raises(ValueError, match="DeepSpeed and FSDP keep in parts: train with DDP"):
        allocates_ranks.AllocatesRanks(ran).on_train_begin(ran.args, state, None)


def test_ranks_that_nothing_allocates_are_said_when_they_are_saved(tmp_path):
    model = adalora(align=None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    inputs, ids = batch()
    message = r"add up to 24, not target_r \* layers = 12, for nothing allocates them: call update_and_allocate"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save_adapter(model, tmp_path / "new")  # whose singular values are zero
    for _ in range(2):
        optimizer.zero_grad()
        model(**inputs, task_ids=ids).loss.backward()
        optimizer.step()
    with pytest.warns(UserWarning, match=message):
        save_adapter(model, tmp_path / "never")
    with pytest.warns(UserWarning, match=message):
        export_peft(model, tmp_path / "exported")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 6):
            update_and_allocate(model, step, 5)
            save_adapter(model, tmp_path / "allocated")  # on the way, and at the end
    with torch.no_grad():
        for layer in allocated_ranks(model):
            model.get_submodule(layer).adapter.lora_E.fill_(1)  # a loop that calls it no more
    with pytest.warns(UserWarning, match=message):
        save_adapter(model, tmp_path / "again")


def test_a_loop_goes_on_by_the_importance_that_it_stored(tmp_path):
    def loop(model, optimizer, steps):
        for step in steps:
            optimizer.zero_grad()
            inputs, ids = batch(step)
            model(**inputs, task_ids=ids).loss.backward()
            optimizer.step()
            update_and_allocate(model, step, 9)

    def made():
        model = adalora(dtype=torch.float32, beta1=0.99, beta2=0.99)
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)

    whole, optimizer = made()
    loop(whole, optimizer, range(1, 5))
    torch.save((whole.state_dict(), optimizer.state_dict(), whole.align_state.ranks), tmp_path / "loop.pt")
    loop(whole, optimizer, range(5, 10))
    ends = []
    for kept in (True, False):
        model, optimizer = made()
        trained_values, of_optimizer, ranks = torch.load(tmp_path / "loop.pt", weights_only=False)
        model.load_state_dict(trained_values)
        optimizer.load_state_dict(of_optimizer)
        model.align_state.ranks = ranks if kept else None
        loop(model, optimizer, range(5, 10))
        ends.append(state(model))
    assert_same_bits(ends[0], state(whole))
    assert any(not torch.equal(ends[1][name], value) for name, value in ends[0].items())


def test_a_training_that_ends_before_its_ranks_are_final_says_so(tmp_path):
    ran = trainer(tmp_path, adalora(align=None), features(), **STEPS, callbacks=[StopAt(2)])
    with pytest.warns(UserWarning, match=r"layers = 12: the training ended, .* before step 4, from which on they are"):
        ran.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "the ranks of adalora")
        trainer(tmp_path, adalora(align=None), features(), **STEPS).train()


@pytest.mark.parametrize(("steps", "final"), [(3, False), (5, True)])
def test_a_checkpoint_holds_what_the_ranks_are_decided_by(tmp_path, steps, final):
    ran = trainer(tmp_path, adalora(), features(), **{**STEPS, "max_steps": 6}, callbacks=[StopAt(steps)])
    ran.train()
    save_trained(ran.model, tmp_path / "checkpoint")
    fresh = adalora()
    load_trained(fresh, tmp_path / "checkpoint")
    here, there = ran.model.align_state.ranks, fresh.align_state.ranks
    assert (bool(here.kept), bool(here.sensitivity)) == (final, not final)
    for part in ("sensitivity", "uncertainty", "kept"):
        assert_same_bits(getattr(here, part), getattr(there, part))
    file = tmp_path / "checkpoint" / "align_ranks.safetensors"
    save_file({"other": torch.zeros(1)}, file)
    before = state(fresh)
    with pytest.raises(ValueError, match=r"align_ranks.safetensors is damaged: .*1 are unexpected \['other'\]"):
        load_trained(fresh, tmp_path / "checkpoint")
    file.unlink()
    with pytest.raises(ValueError, match=r"align_ranks.safetensors is missing"):
        load_trained(fresh, tmp_path / "checkpoint")
    assert_same_bits(state(fresh), before)


def test_pefts_folder_is_ours_and_ours_is_pefts(tmp_path):
    """PEFT trains and prunes; what it saves computes the same here, and what is saved here the same there."""
    theirs = get_peft_model(plain(), AdaLoraConfig(
        target_modules=LAYERS, init_r=6, target_r=2, tinit=0, tfinal=1, total_step=4, lora_alpha=5,
    )).train()  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 4):
        optimizer.zero_grad()
        theirs(**batch(step)[0]).loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
    wanted = logits(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    pattern = theirs.peft_config["default"].rank_pattern
    ranks = {name: sum(mask) for name, mask in pattern.items()}
    assert len(set(ranks.values())) > 1
    ours = load_adapter(plain(), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), wanted, rtol=1e-5, atol=1e-6)
    assert allocated_ranks(ours) == {name.removesuffix(".lora_E"): rank for name, rank in ranks.items()}
    for name, mask in pattern.items():
        adapter = ours.get_submodule(name.removesuffix(".lora_E")).adapter
        assert (adapter.lora_E[:, 0] != 0).tolist() == mask, "each triplet is in its place"
    config = ours.align_state.config
    assert (config.r, config.target_r, config.total_step, config.orth_reg_weight) == (6, 2, 4, 0.5)
    save_adapter(ours, tmp_path / "ours")
    assert_same_bits(state(load_adapter(plain(), tmp_path / "ours")), state(ours))
    again = PeftModel.from_pretrained(plain(), tmp_path / "ours")
    torch.testing.assert_close(logits(again), wanted, rtol=1e-5, atol=1e-6)


def test_the_folder_is_pefts_own_form_alone_and_the_export_a_lora(tmp_path):
    model = trained("adalora")
    save_adapter(model, tmp_path)
    peft = json.loads((tmp_path / "adapter_config.json").read_text())
    names = ("peft_type", "init_r", "target_r", "total_step", "tinit", "tfinal", "deltaT")
    assert [peft[name] for name in names] == ["ADALORA", 3, 2, 1, 0, 0, 1]
    assert not (tmp_path / "align_lora_heads.safetensors").exists()
    keys = {key.rpartition(".")[2] for key in load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {"lora_A", "lora_E", "lora_B"}
    export_peft(model, tmp_path / "exported")
    assert json.loads((tmp_path / "exported/adapter_config.json").read_text())["peft_type"] == "LORA"
    for folder in (tmp_path, tmp_path / "exported"):
        theirs = PeftModel.from_pretrained(plain(), folder)
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("pattern", "match"),
    [({"model.layers.0.mlp.up_proj.lora_E": [True, False, True]}, "does not fit init_r=3 and its rank_pattern"),
     ({"model.layers.0.mlp.up_proj.lora_E": 3}, "does not fit init_r=3 and its rank_pattern")],
)  # fmt: skip
def test_a_pattern_of_ranks_that_is_none_is_refused(tmp_path, pattern, match):
    save_adapter(trained("adalora"), tmp_path)
    (tmp_path / "align_lora_config.json").unlink()
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rank_pattern": pattern}))
    with pytest.raises(ValueError, match=match):
        load_adapter(plain(), tmp_path)


def test_options_may_be_pefts():
    config = AdaLoraConfig(
        init_r=6, target_r=3, tinit=2, total_step=9, target_modules=["up_proj"], orth_reg_weight=0.25
    )
    ours = replace_linear_with_align_lora(plain(), config).align_state.config
    assert (ours.architecture, ours.r, ours.target_r, ours.tinit, ours.total_step) == ("adalora", 6, 3, 2, 9)
    assert (ours.orth_reg_weight, ours.lora_alpha, ours.deltaT) == (0.25, 8, 1)
