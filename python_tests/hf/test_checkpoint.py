"""Checkpoints of AlignTrainer: what is trained and no more, read strictly; a run that goes on is the run unbroken."""

import math

import pytest
import torch
from hf.resumed import CASES, build, go_on, state
from hf.trainers import NAMES, WEIGHT, adapted, features, logged, trainer
from hf.words import llama
from processes import spawn
from safetensors.torch import load_file

from align_ext import load_adapter
from align_ext.training.checkpoint import load_trained, save_trained
from align_ext.training.schedule import schedule_factor


def test_a_run_that_goes_on_in_a_new_process_is_the_unbroken_run_to_the_bit(tmp_path):
    unbroken = {}
    for case in CASES:
        ran = build(case, tmp_path / case)
        start = state(ran.model)
        ran.train()
        unbroken[case] = state(ran.model)
        assert any(not torch.equal(tensor, start[name]) for name, tensor in unbroken[case].items())
    spawn(go_on, str(tmp_path), processes=1)
    for case, expected in unbroken.items():
        resumed = load_file(tmp_path / f"{case}.safetensors")
        assert resumed.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(resumed[name], tensor), (case, name)
    ages = [tensor for name, tensor in unbroken["spectral, blocks"].items() if "lora_age" in name]
    assert ages
    assert all(age > 0 for age in ages)


def test_a_checkpoint_holds_the_adapters_and_what_else_is_trained_but_not_the_frozen_model(tmp_path):
    model = adapted()
    model.model.norm.weight.requires_grad_(True)
    ran = trainer(tmp_path, model, features(), save_strategy="steps", max_steps=3, save_steps=3, learning_rate=1e-2)
    ran.train()
    folder = tmp_path / "checkpoint-3"
    keys = {key for key in load_file(folder / "adapter_model.safetensors") if "lora_" not in key}
    assert keys == {"base_model.model.model.norm.weight"}
    assert not list(folder.glob("model*")) + list(folder.glob("*.bin"))
    trained = state(model) | {"norm": model.model.norm.weight.detach()}
    assert not torch.equal(trained["norm"], adapted().model.norm.weight)
    fresh = adapted()
    fresh.model.norm.weight.requires_grad_(True)
    load_trained(fresh, folder)
    loaded = state(fresh) | {"norm": fresh.model.norm.weight.detach()}
    assert all(torch.equal(loaded[name], tensor) for name, tensor in trained.items())
    alone = load_adapter(llama(torch.float64), folder)
    assert all(torch.equal(state(alone)[name], tensor) for name, tensor in state(model).items())


def test_the_best_checkpoint_comes_back_at_the_end(tmp_path):
    kept = {}
    ran = trainer(
        tmp_path, adapted(), features(), eval_rows=features(6), max_steps=3, learning_rate=1e-2, eval_strategy="steps",
        eval_steps=1, save_strategy="steps", save_steps=1, load_best_model_at_end=True,
        greater_is_better=True,
    )  # fmt: skip
    save = ran._save_checkpoint
    ran._save_checkpoint = lambda model, trial: (kept.update({ran.state.global_step: state(model)}), save(model, trial))
    ran.train()
    best = int(ran.state.best_model_checkpoint.rpartition("-")[2])
    assert best == 1  # the loss falls, and the greatest is asked for
    for name, tensor in state(ran.model).items():
        assert torch.equal(tensor, kept[best][name])
        assert not torch.equal(tensor, kept[3][name])


def test_another_adapter_or_other_trained_parameters_are_refused_and_change_nothing(tmp_path):
    model = adapted()
    save_trained(model, tmp_path, NAMES)
    before = state(model)
    with pytest.raises(ValueError, match="r="):
        load_trained(adapted(r=2), tmp_path)
    with pytest.raises(ValueError, match="no adapter folder"):
        load_trained(model, tmp_path / "elsewhere")
    model.model.norm.weight.requires_grad_(True)
    with pytest.raises(ValueError, match=r"1 keys are missing \['model.norm.weight'\].*trained beside the adapters"):
        load_trained(model, tmp_path)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())


def test_the_schedules_rise_over_the_warm_up_and_end_at_one_or_zero():
    for kind, at_half, at_end in ("constant", 1, 1), ("linear", 0.5, 0), ("cosine", 0.5, 0):
        assert [schedule_factor(kind, 0.2, step, 10) for step in (0, 1, 2)] == [0, 0.5, 1]
        assert schedule_factor(kind, 0.2, 6, 10) == pytest.approx(at_half)
        assert schedule_factor(kind, 0.2, 10, 10) == pytest.approx(at_end, abs=1e-12)
    assert schedule_factor("cosine", 0, 1, 4) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert schedule_factor("linear", 0, 0, 1) == 1


def test_the_weight_in_force_is_logged_and_is_the_losses(tmp_path):
    arguments = {"align_schedule": "linear", "align_warmup": 0.25}
    ran = trainer(tmp_path, adapted(), features(), arguments=arguments, max_steps=4)
    ran.train()
    factors = [0, 1, 2 / 3, 1 / 3]
    assert [entry["align_weight"] for entry in logged(ran)] == pytest.approx([WEIGHT * f for f in factors])
    for entry in logged(ran):
        whole = entry["lm_loss"] + entry["align_weight"] * entry["align_loss"]
        assert entry["loss"] == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize(
    ("option", "match"),
    [({"align_schedule": "cosin"}, "did you mean 'cosine'"), ({"align_warmup": 1.0}, "0 <= share < 1, got 1.0")],
)
def test_a_schedule_that_is_none_is_refused(tmp_path, option, match):
    with pytest.raises(ValueError, match=match):
        trainer(tmp_path, adapted(), features(), arguments=option)
