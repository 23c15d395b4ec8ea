"""The training job end to end on a tiny model: what it writes, what it proves, and what stays when it fails."""

import itertools
import json
import re
from typing import get_args

import pytest
import torch
from hf import words
from hf.runs import console, prepare, run
from hf.words import gpt2, llama, model_folder, qwen2, rows, tokenizer, write_rows
from peft import PeftModel
from safetensors.torch import load_file

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.architectures import Architecture
from align_ext.base_model import dtypes
from align_ext.base_model.load import load_model
from align_ext.data.encode import encode
from align_ext.training import fit, recipe


def verdicts(checks):
    return {name: check["passed"] for name, check in checks.items()}


def test_a_run_lowers_every_loss_and_writes_an_adapter_that_stock_peft_reads(place):
    results, said = run(place)
    out = place / "work/out"
    assert sorted(p.name for p in out.iterdir()) == ["adapter", "results.json", "rows.jsonl.gz"]
    assert list((place / "work").iterdir()) == [out], "nothing else is left behind"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    for task in ("threes", "next"):
        assert results["after"]["tasks"][task]["loss"] < 0.9 * results["before"]["tasks"][task]["loss"]
        assert f"{results['after']['tasks'][task]['loss']:.3f}" in said
    assert results["before"]["align"] > 0
    assert results["after"]["align"] != results["before"]["align"]
    assert [entry["step"] for entry in results["losses"]] == [1, 3, 6, 9, 12]
    assert {"lm_loss", "align_loss", "loss/threes", "loss/next"} <= results["losses"][0].keys()
    assert verdicts(results["checks"]) == {"loaded again": True, "merged": True, "stock PEFT": True}
    plain, _ = load_model(str(place / "model"), "float32")
    ids = torch.tensor([tokenizer()("after 3 comes\n4")["input_ids"]])
    with torch.no_grad():
        before = plain(input_ids=ids).logits
        after = PeftModel.from_pretrained(plain, out / "adapter")(input_ids=ids).logits
    assert (after - before).abs().max() > 0.1


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return [model_folder(tmp_path_factory.mktemp(model.__name__), model=model) for model in (llama, gpt2, qwen2)]


ALIGN, ARCHITECTURES = ("kl", "mmd", "none"), get_args(Architecture)
MERGED = (
    "lora",
    "align_lora",
    "m_lora",
    "multilora",
    "nlora",
    "adalora",
)  # one change of each weight, which PEFT's LoRA can express
# Architectures take the alignments in turn; each of the two papers' own meets the others with --slow.
OWN = ARCHITECTURES.index("mtlora") + 1
IN_TURN = list(zip(ARCHITECTURES, itertools.cycle(ALIGN), strict=False))
OTHERS = [case for case in itertools.product(ARCHITECTURES[:OWN], ALIGN) if case not in IN_TURN]
CASES = [*IN_TURN, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]


@pytest.mark.parametrize(("architecture", "align"), CASES)
def test_every_architecture_trains_with_every_alignment_and_saves_what_it_trained(place, folders, architecture, align):
    # Over the alignments, every architecture meets every model.
    model = folders[(ARCHITECTURES.index(architecture) + ALIGN.index(align)) % 3]
    changed = {"architecture": architecture, "align": align, "steps": 2, "eval_examples": 2, "log_steps": 1}
    results, said = run(place, model=str(model), r=4, **changed)
    logged = {name for name in results["losses"][0] if name.endswith("_loss")}
    own = {"mtlora": {"balance_loss", "spectral_loss"}, "mixlora": {"balance_loss"}, "adalora": {"orth_loss"}}
    own = own.get(architecture, set())
    assert logged == {"lm_loss", *own} | ({"align_loss"} if align != "none" else set())
    measured = results["after" if architecture == "adalora" else "before"]  # whose latents start from zero
    assert measured["align"] > 0, "alignment is measured where it is not trained, too"
    for task in ("threes", "next"):
        assert results["after"]["tasks"][task]["loss"] != results["before"]["tasks"][task]["loss"]
    one = True if architecture in MERGED else None
    assert verdicts(results["checks"]) == {"loaded again": True, "merged": one, "stock PEFT": one}
    if one is None:
        assert "merged: does not apply: it" in said
        assert f"stock PEFT: does not apply: PEFT's LoRA cannot express architecture {architecture!r}" in said


@pytest.mark.parametrize("architecture", ["align_lora", "m_lora"])
def test_a_run_with_dora_is_whole(place, folders, architecture):
    changed = {"architecture": architecture, "steps": 2, "eval_examples": 2, "use_dora": True}
    results, said = run(place, model=str(folders[2]), r=4, **changed)
    assert verdicts(results["checks"]) == {"loaded again": True, "merged": True, "stock PEFT": True}, said


def test_what_the_user_names_is_adapted_and_nothing_is_said_of_it(place, folders):
    said = console()
    job = prepare(place, said, model=str(folders[1]), target_modules="c_attn")
    assert {name.rpartition(".")[2] for name in adapted_layers(job.model)} == {"c_attn"}
    assert said.file.getvalue() == ""


def test_the_same_seed_gives_the_same_run_and_another_seed_another(place):
    first, _ = run(place, output="a", steps=3)
    second, _ = run(place, output="b", steps=3)
    third, _ = run(place, output="c", steps=3, seed=1)
    losses = [[entry["loss"] for entry in results["losses"]] for results in (first, second, third)]
    assert losses[0] == losses[1] != losses[2]


def test_every_micro_batch_of_every_step_holds_the_mix_of_tasks(place, monkeypatch):
    seen = []

    class Recording(fit.AlignTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append(sorted(inputs["task_ids"].tolist()))
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(fit, "AlignTrainer", Recording)
    run(place, steps=4, accumulation=2, batch_size=4)
    assert seen == [[0, 0, 1, 1]] * 8


def test_accumulation_and_checkpointing_run_and_plain_lora_has_no_alignment(place):
    results, _ = run(place, steps=2, accumulation=2, gradient_checkpointing=True)
    assert results["losses"][0]["align_loss"] > 0
    results, said = run(place, output="lora", steps=2, architecture="lora", batch_size=2, tasks=("next",))
    assert results["before"]["align"] is None
    assert "alignment" not in said
    assert "align_loss" not in results["losses"][0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": "absent.jsonl"}, "no data file or folder 'absent.jsonl'"),
        ({"model": "/absent"}, "no model folder '/absent'"),
        ({"tasks": ("next",)}, "alignment needs two tasks"),
        ({"tasks": ("nexd",)}, "did you mean 'next'"),
        ({"seq_len": 3}, "are too long for seq_len=3: give a larger one"),
        ({"target_modules": ("absent",)}, "no layer was adapted"),
        ({"architecture": "adalora", "align": None, "tinit": 11, "tfinal": 1}, "leave none of 12 optimizer steps"),
        ({"architecture": "adalora", "align": None, "total_step": 90}, "12 optimizer steps, .* final at step 45"),
        ({"output": "file"}, "is a file"),
        ({"output": "full"}, "not empty: use --overwrite"),
        ({"output": "file/below"}, "cannot be made"),
        ({"resume": True}, "'out' holds no checkpoint to resume from: --save-steps"),
        ({"resume": True, "output": None}, "name it with --output"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(place, changed, message):
    (place / "work/file").write_text("mine")
    (place / "work/full").mkdir()
    (place / "work/full/mine").write_text("mine")
    before = sorted(place.rglob("*"))
    with pytest.raises(ValueError, match=message) as caught:
        prepare(place, **changed)
    assert "\n" not in str(caught.value)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(("gpu", "reason"), [(False, "torch sees no GPU"), (True, "no CUDA kernels")])
def test_a_gpu_is_used_only_where_there_is_one_and_kernels_for_it(place, monkeypatch, gpu, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(dtypes, "has_kernel", lambda op, device: False)
    with pytest.raises(ValueError, match=f"device=cuda, but .*{reason}"):
        prepare(place, device="cuda")
    assert dtypes.usable_device("auto") == "cpu"
    monkeypatch.setattr(dtypes, "has_kernel", lambda op, device: True)
    assert dtypes.usable_device("auto") == ("cuda" if gpu else "cpu")
    assert dtypes.usable_device("cpu") == "cpu"


def test_a_gpu_keeps_its_number_which_has_to_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(dtypes, "has_kernel", lambda op, device: True)
    assert [dtypes.usable_device(device) for device in ("cuda:1", "cuda", "cpu", "auto")] == [
        "cuda:1",
        "cuda",
        "cpu",
        "cuda",
    ]
    for device in ("cuda:2", "cuda:one"):
        with pytest.raises(ValueError, match=rf"device={device}, but the GPUs here are 0 \.\. 1"):
            dtypes.usable_device(device)


class Interrupt(Exception):
    pass


def fails(*_, **__):
    raise Interrupt


@pytest.mark.parametrize("where", ["score_together", "fit", "save_adapter"])
def test_an_interrupt_before_the_adapter_is_saved_leaves_nothing(place, where, monkeypatch):
    monkeypatch.setattr(recipe, where, fails)
    with pytest.raises(Interrupt):
        run(place, steps=1)
    assert list((place / "work").iterdir()) == []


@pytest.mark.parametrize("where", ["verify", "shown_answers"])
def test_a_failure_after_training_keeps_what_was_trained(place, where, monkeypatch):
    monkeypatch.setattr(recipe, where, fails)
    with pytest.raises(Interrupt):
        run(place, steps=1)
    assert (place / "work/out/adapter/adapter_model.safetensors").is_file()
    assert len(json.loads((place / "work/out/results.json").read_text())["losses"]) == 1
    assert [p.name for p in (place / "work").iterdir()] == ["out"]


def test_a_merge_that_changes_the_model_fails_its_check(place, monkeypatch):
    monkeypatch.setattr(AdaptedLinear, "merged_base", lambda layer: layer.base_layer)
    results, said = run(place)
    assert not results["checks"]["merged"]["passed"]
    assert results["checks"]["stock PEFT"]["passed"]
    assert "merged: OTHER LOGITS" in said


def test_examples_that_do_not_fit_are_left_out_and_counted(place):
    job = prepare(place, seq_len=34)
    lengths = [sum(map(len, encode(job.tokenizer, x.prompt, x.answer))) for x in (*job.data.train, *job.data.test)]
    assert max(lengths) <= 34
    assert len(job.data.test) == 8
    assert job.data.usage["threes"]["train"].left_out["too long (seq_len)"] > 0


def test_overwrite_replaces_a_run_and_a_default_output_never_does(place):
    run(place, steps=1, save_steps=1)
    old = json.loads((place / "work/out/results.json").read_text())
    run(place, steps=1, overwrite=True, seed=1)
    assert json.loads((place / "work/out/results.json").read_text())["options"]["seed"] == 1 != old["options"]["seed"]
    assert not (place / "work/out/checkpoints").exists()
    (place / "work/align_lora_run").mkdir()
    run(place, steps=1, output=None)
    assert (place / "work/align_lora_run-2/results.json").is_file()
    assert list((place / "work/align_lora_run").iterdir()) == []


def weights(folder):
    return load_file(folder / "adapter/adapter_model.safetensors")


class StopAt(fit.ShowProgress):
    """Ctrl-C at the end of a step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 5:
            raise KeyboardInterrupt


LONG = {
    "steps": 6, "accumulation": 2, "batch_size": 4, "align_accumulation": "exact", "mixing": "temperature",
    "mixing_temperature": 3, "align_schedule": "cosine", "align_warmup": 0.2, "eval_steps": 2, "save_steps": 3,
}  # fmt: skip


def test_an_interrupted_run_that_is_resumed_is_the_unbroken_one_to_the_bit(place, monkeypatch):
    unbroken, said = run(place, output="whole", **LONG)
    assert "held-out loss" in said
    assert [entry["step"] for entry in unbroken["evaluations"]] == [2, 4, 6]
    assert {"eval_loss/threes", "eval_loss/next"} <= unbroken["evaluations"][0].keys()
    with monkeypatch.context() as patch:
        patch.setattr(fit, "ShowProgress", StopAt)
        with pytest.raises(KeyboardInterrupt):
            run(place, **LONG)
    work = place / "work"
    assert [p.name for p in (work / "out").iterdir()] == ["checkpoints"]
    with pytest.raises(ValueError, match="'out' is not empty: use --resume"):
        prepare(place, **LONG)
    with pytest.raises(ValueError, match=r"the run in 'out' had lr=0\.02, not 0\.5"):
        prepare(place, **LONG | {"lr": 0.5, "resume": True})
    resumed, said = run(place, **LONG, resume=True)
    assert "going on from out/checkpoints/checkpoint-3" in said
    assert "step 1/6" not in said, "a run from the start would end in the same bits"
    assert "step 6/6" in said
    assert re.search(r"wrote out \(score before \d+ s, train from step 3 on \d+ s, ", said)
    for name, tensor in weights(work / "whole").items():
        assert torch.equal(weights(work / "out")[name], tensor), name
    timeless = ("loss", "align_loss", "align_weight", "step")
    for one, other in zip(resumed["losses"], unbroken["losses"], strict=True):
        assert {name: one[name] for name in timeless} == {name: other[name] for name in timeless}
    assert resumed["after"] == unbroken["after"]
    assert sorted(p.name for p in (work / "out/checkpoints").iterdir()) == [
        "checkpoint-3", "checkpoint-6", "options.yaml",
    ]  # fmt: skip
    assert sorted(p.name for p in work.iterdir()) == ["out", "whole"]
    with pytest.raises(ValueError, match="is complete: there is nothing to resume"):
        prepare(place, **LONG, resume=True)


def test_an_interrupt_before_the_first_checkpoint_leaves_nothing(place, monkeypatch):
    monkeypatch.setattr(fit, "ShowProgress", StopAt)
    with pytest.raises(KeyboardInterrupt):
        run(place, steps=6, save_steps=6)
    assert list((place / "work").iterdir()) == []


def test_the_schedule_of_the_alignment_and_its_accumulation_reach_the_trainer(place):
    changed = {"steps": 4, "log_steps": 1, "accumulation": 2, "batch_size": 4}
    results, _ = run(place, align_schedule="linear", align_weight=0.5, **changed)
    assert [entry["align_weight"] for entry in results["losses"]] == pytest.approx([0.5, 0.375, 0.25, 0.125])
    first = {}
    for kind in ("micro", "queue", "exact"):
        results, _ = run(place, output=kind, align_accumulation=kind, **changed)
        first[kind] = results["losses"][0]["align_loss"]
    assert len(set(first.values())) == 3, "one batch, the last ones too, the union"


@pytest.mark.parametrize("mixing", ["proportional", "temperature", "equal", "round_robin"])
def test_the_mixing_decides_how_often_a_task_comes(place, mixing, monkeypatch):
    rows = [row for i, row in enumerate(words.rows(40)) if row["task"] == "next" or i % 8 == 0]
    write_rows(place / "rows.jsonl", rows)
    seen = []

    class Recording(fit.AlignTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.extend(inputs["task_ids"].tolist())
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(fit, "AlignTrainer", Recording)
    results, _ = run(place, steps=6, mixing=mixing, architecture="lora", per_task=1, eval_examples=2)
    share = {"proportional": 38 / 46, "temperature": 38**0.5 / (38**0.5 + 8**0.5)}.get(mixing, 0.5)
    assert seen.count(0) / len(seen) == pytest.approx(share, abs=0.06)
    assert results["options"]["mixing"] == mixing


def test_a_conversation_without_a_chat_template_is_refused_though_its_row_would_not_be_taken(place):
    turns = [{"role": "user", "content": "q"}]
    content = [*rows(), {"task": "next", "prompt": turns, "completion": "c"}]
    write_rows(place / "talk.jsonl", content)
    for seed in range(3):
        with pytest.raises(ValueError, match=r"'talk.jsonl', line 49: a conversation, .* needs a chat template"):
            prepare(place, data=str(place / "talk.jsonl"), seed=seed, train_examples=2, eval_examples=2)
