"""Runs that are killed, ended, started twice, diverge, or fill the disk: what was whole stays, and they can go on."""

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from hf.killed import OPTIONS, adapter_of
from hf.trainers import adapted, diverges, features, on_rank, trainer
from hf.words import llama, model_folder, write_rows
from processes import python, spawn
from safetensors.torch import load_file

from align_ext.system.locks import InUse, claimed
from align_ext.system.memory import OutOfMemory, enough_memory
from align_ext.system.terminal import plain_console
from align_ext.training import fit, recipe
from align_ext.training import safe_saving as safely
from align_ext.training.options import TrainOptions
from align_ext.training.run_folder import open_run
from align_ext.training.safe_saving import Diverged
from align_ext.training.whole_checkpoints import MANIFEST, last_checkpoint

EVENTS = (70, 112, 128, -12)  # of about 170; check-full tries all


@pytest.mark.slow
@pytest.mark.parametrize("overwriting", [(), ("--overwrite",)])
def test_a_run_killed_at_a_file_event_goes_on_to_the_bit(tmp_path, overwriting):
    events = (-12, -9) if overwriting else EVENTS
    process = python("-m", "hf.killed", tmp_path, *overwriting, *events, cwd=tmp_path)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said[-2000:]
    assert f"0 problems of {len(events)}" in said


@pytest.fixture
def place(place, monkeypatch):
    monkeypatch.setattr(recipe, "verify", lambda job, adapter: {})
    return place


def train(place, **changed):
    paths = {"model": str(place / "model"), "data": str(place / "rows.jsonl"), "output": "out"}
    with open_run(TrainOptions.from_mapping(OPTIONS | paths | changed)) as folder:
        return recipe.train(recipe.prepare(folder, plain_console()), plain_console())


def command(place, *flags):
    options = "".join(f"{name}: {value}\n" for name, value in OPTIONS.items())
    (place / "x.yaml").write_text(f"{options}model: {place / 'model'}\ndata: {place / 'rows.jsonl'}\n")
    return python(
        "-c", "from align_ext.cli import main; main()", "train", "--config", place / "x.yaml", *flags, cwd=Path.cwd()
    )


@pytest.mark.slow
def test_two_runs_at_once_without_an_output_have_each_their_own(place):
    both = [command(place) for _ in range(2)]
    said = [process.communicate(timeout=300)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert sorted(os.listdir()) == ["align_lora_run", "align_lora_run-2"]
    assert adapter_of(Path("align_lora_run")) == adapter_of(Path("align_lora_run-2")) is not None


@pytest.mark.parametrize(
    ("number", "last"),
    [(signal.SIGTERM, "ended by SIGTERM"), pytest.param(signal.SIGINT, "interrupted", marks=pytest.mark.slow)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_signal_writes_a_checkpoint_after_the_step_and_the_run_goes_on_to_the_bit(place, number, last):
    more = {"save_steps": 0, "steps": 30}  # so that the signal is not too late
    train(place, output="whole", **more)
    process = command(place, "--output", "out", "--save-steps", 0, "--steps", 30, "--log-steps", 1)
    for line in process.stdout:
        if line.startswith("step 1/30"):
            process.send_signal(number)
            process.send_signal(number)  # as torchrun passes it on
            break
    said = process.stdout.read()
    assert process.wait(60) == 128 + number, said
    assert said.splitlines()[-1] == f"align-lora: {last}"
    assert "is kept: --resume goes on from it" in said
    assert last_checkpoint(Path("out/checkpoints")) is not None
    assert not Path("out/adapter").exists()
    train(place, resume=True, **more)
    assert adapter_of(Path("out")) == adapter_of(Path("whole"))
    assert sorted(os.listdir("out")) == ["adapter", "results.json", "rows.jsonl.gz"]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "delay"), [(signal.SIGINT, 0.3)])
def test_a_signal_at_any_time_leaves_what_goes_on_to_the_bit_or_nothing(place, number, delay):
    train(place, output="whole")
    process = command(place, "--output", "out")
    for line in process.stdout:
        if "examples to train on" in line:  # it has begun
            time.sleep(delay)
            break
    process.send_signal(number)
    said, _ = process.communicate(timeout=120)
    assert process.returncode in (0, 128 + number), said
    # Python prints an exception that reaches a finalizer (another package's, here) and goes on.
    assert "Traceback" not in re.sub(r"Exception ignored in.*?\nKeyboardInterrupt[^\n]*\n", "", said, flags=re.DOTALL)
    if not Path("out/results.json").exists():
        train(place, resume=last_checkpoint(Path("out/checkpoints")) is not None)
    assert adapter_of(Path("out")) == adapter_of(Path("whole"))


def test_a_full_disk_keeps_the_last_whole_checkpoint_and_is_one_line(place, monkeypatch):
    train(place, output="whole")
    save, calls = torch.save, []

    def full(content, file, *args, **kwargs):
        calls.append(file)
        save(content, file, *args, **kwargs)
        if len(calls) == 5:  # in the second checkpoint
            raise RuntimeError("PytorchStreamWriter failed writing file data/2: file write failed")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"checkpoint '.*checkpoint-2' cannot be written: Pyt"):
            train(place)
    assert sorted(os.listdir("out/checkpoints")) == ["checkpoint-1", "options.yaml"]
    llama(seed=1).save_pretrained(place / "model")
    with pytest.raises(ValueError, match=r"another base model.*a run goes on with its own base only"):
        train(place, resume=True)
    llama().save_pretrained(place / "model")
    train(place, resume=True)
    assert adapter_of(Path("out")) == adapter_of(Path("whole"))


def damage_cut(checkpoint):
    os.truncate(checkpoint / "optimizer.pt", 100)


def damage_bit(checkpoint):
    content = bytearray((checkpoint / "rng_state.pth").read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / "rng_state.pth").write_bytes(content)


def damage_gone(checkpoint):
    (checkpoint / "scheduler.pt").unlink()


def damage_manifest(checkpoint):
    (checkpoint / MANIFEST).write_text("{")


@pytest.mark.parametrize("harm", [damage_cut, damage_bit, damage_gone, damage_manifest])
def test_a_checkpoint_that_was_damaged_later_is_passed_over_for_the_last_whole_one(place, harm, capsys):
    train(place, output="out")
    expected = adapter_of(Path("out"))
    Path("out/results.json").unlink()
    harm(Path("out/checkpoints/checkpoint-3"))
    train(place, resume=True)
    assert "going on from out/checkpoints/checkpoint-2" in capsys.readouterr().out
    assert adapter_of(Path("out")) == expected


@pytest.mark.parametrize("name", ["thesis.tex", "adapter/thesis.tex", "checkpoints/checkpoint-2/thesis.tex", "a/b"])
def test_overwriting_replaces_nothing_that_no_run_has_written(place, name):
    train(place, output="out")
    Path("out", name).parent.mkdir(exist_ok=True)
    Path("out", name).write_text("mine")
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"holds '{name}', which no run has written"):
        train(place, overwrite=True)
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*") if path.is_file()} == before
    assert os.listdir() == ["out"]


def test_a_run_that_is_overwritten_stays_until_the_new_one_is_complete(place, monkeypatch):
    train(place, output="out")
    old = adapter_of(Path("out"))
    with monkeypatch.context() as patch:
        patch.setattr(recipe, "save_adapter", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(place, overwrite=True, seed=5)
    assert adapter_of(Path("out")) == old
    with pytest.raises(ValueError, match="use --resume to go on with its run, --overwrite"):
        train(place, seed=5)
    train(place, resume=True, seed=5)
    assert adapter_of(Path("out")) not in (None, old)
    assert os.listdir() == ["out"]


@pytest.mark.parametrize("output", ["", " ", "link", "n" * 300, "file/x", "a\0b", "/proc/x"])
def test_an_output_that_cannot_be_is_known_before_anything_is_loaded(place, output):
    Path("link").symlink_to("nowhere")
    Path("file").write_text("mine")
    with pytest.raises(ValueError, match=r"output|folder") as caught:
        train(place, output=output, model="/absent")
    assert "\n" not in str(caught.value)
    assert sorted(os.listdir()) == ["file", "link"]


def test_a_run_may_be_in_the_current_folder_if_that_is_empty(place):
    train(place, output=".")
    assert sorted(os.listdir()) == ["adapter", "checkpoints", "results.json", "rows.jsonl.gz"]


@pytest.mark.parametrize("task", ["a/b", "..", "/etc/x", "[/bold]\n", "x" * 5000])
def test_tasks_that_name_no_folder_are_known_before_training(place, task):
    rows = [json.loads(row) for row in (place / "rows.jsonl").read_text().splitlines()]
    write_rows(place / "rows.jsonl", [row | ({"task": task} if row["task"] == "next" else {}) for row in rows])
    with pytest.raises(ValueError, match=r"name|task"):
        train(place, architecture="multi_adapter")
    assert os.listdir() == []


def test_data_that_changed_does_not_go_on(place):
    train(place, output="out")
    Path("out/results.json").unlink()
    rows = (place / "rows.jsonl").read_text().replace("comes", "follows")
    (place / "rows.jsonl").write_text(rows)
    with pytest.raises(ValueError, match="the data of the run in 'out' was other"):
        train(place, resume=True)


def unfinished(place, **options):
    train(place, output="out", **options)
    Path("out/results.json").unlink()


def test_a_chat_template_that_changed_does_not_go_on(place):
    model_folder(place / "model", chat=True)
    unfinished(place)
    template = place / "model/chat_template.jinja"
    before = template.read_text()
    template.write_text(before.replace("<bot>", "<assistant>"))
    with pytest.raises(ValueError, match=r"had other tokens of the same data.*chat template has changed: put it back"):
        train(place, resume=True)
    template.write_text(before)
    train(place, resume=True)


def test_a_run_goes_on_divided_as_it_began(place):
    unfinished(place)
    Path("zero.json").write_text("{}")
    with pytest.raises(ValueError, match=r"began without --deepspeed, .*: leave it out, or start another run"):
        train(place, resume=True, deepspeed="zero.json")
    record = Path("out/checkpoints/options.yaml")
    record.write_text(record.read_text().replace("fsdp: false", "fsdp: true"))
    with pytest.raises(ValueError, match=r"began with --fsdp, .*: give it, or start another run from its adapter"):
        train(place, resume=True)


def test_a_base_of_another_configuration_does_not_go_on(place):
    unfinished(place)
    config = place / "model/config.json"
    before = config.read_text()
    config.write_text(json.dumps(json.loads(before) | {"hidden_act": "gelu"}))
    with pytest.raises(ValueError, match=r"hidden_act is 'gelu', not 'silu'; a run goes on with its own base only"):
        train(place, resume=True)
    config.write_text(before)
    record = Path("out/checkpoints/options.yaml")
    record.write_text("".join(row for row in record.open() if "tokens_digest" not in row))
    train(place, resume=True)  # as of a version that kept no digest of tokens


def test_a_diverged_run_stops_with_the_last_finite_checkpoint(place, capsys):
    with pytest.raises(Diverged, match=r"diverged: .* is not finite at step \d"):
        train(place, lr=1000, steps=30)
    assert not Path("out/adapter").exists()
    if kept := last_checkpoint(Path("out/checkpoints")):
        assert f"{kept} is kept" in capsys.readouterr().out
        assert all(bool(t.isfinite().all()) for t in load_file(kept / "adapter_model.safetensors").values())


class Poison(torch.autograd.Function):
    """The identity, whose gradient is not finite from a step on."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("filtered", [True, False])
def test_a_script_stops_before_the_step_whose_loss_or_gradient_is_not_finite(tmp_path, what, filtered):
    ran = trainer(
        tmp_path, adapted(), features(), max_steps=6, gradient_accumulation_steps=2, save_strategy="steps",
        save_steps=1, learning_rate=1e-3, max_grad_norm=1.0, logging_nan_inf_filter=filtered,
    )  # fmt: skip
    own, calls = ran.compute_loss, []

    def compute_loss(*args, **kwargs):
        calls.append(1)
        loss = own(*args, **kwargs)
        if len(calls) < 5:  # the first micro-batch of the third step
            return loss
        return loss * float("nan") if what == "loss" else Poison.apply(loss)

    ran.compute_loss = compute_loss
    quantity = "the loss" if what == "loss" else "the norm of the gradient"
    with pytest.raises(Diverged, match=f"{quantity} is not finite at step 3; lower"):
        ran.train()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert all(bool(p.isfinite().all()) for p in ran.model.parameters())


def test_a_skipped_step_of_a_scaler_is_no_divergence_until_there_is_nothing_to_lower(tmp_path):
    ran = trainer(tmp_path, adapted(), features())
    ran.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for scale, stops in ((4.0, False), (1.0, True)):
        ran.accelerator.scaler.load_state_dict(ran.accelerator.scaler.state_dict() | {"scale": scale})
        ran.accelerator.scaler.scale(torch.ones(()))
        ran._finite = safely._FiniteRecord()
        ran._finite.record(0, torch.ones(()))
        ran._finite.record(1, torch.tensor(float("inf")))
        ran._finite.end_step(7)
        with pytest.raises(Diverged, match="step 7") if stops else contextlib.nullcontext():
            ran._check_finite()


def test_a_folder_that_another_process_works_in_is_refused(place):
    code = (
        "import sys, pathlib\nfrom align_ext.system.writing import claimed\n"
        "with claimed(pathlib.Path(sys.argv[1])): print('ready', flush=True); sys.stdin.read()"
    )
    other = python("-c", code, "out", cwd=place / "work", stdin=subprocess.PIPE)
    assert other.stdout.readline() == "ready\n"
    ran = trainer("out", adapted(), features(), save_strategy="steps", save_steps=1)
    with pytest.raises(InUse, match="another process is writing to"):
        ran.train()
    for changed in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(InUse, match="another process is writing to 'out'"):
            train(place, model="/absent", **changed)
    other.communicate("")
    ran.train()
    with claimed(Path("out")):
        assert last_checkpoint(Path("out")).name == "checkpoint-1"


def test_a_script_goes_on_from_the_last_whole_checkpoint_and_not_from_another(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3, "save_total_limit": 2}
    trainer(tmp_path, adapted(), features(), **options).train()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    damage_cut(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"checkpoint-3' is not whole \(optimizer.pt .*: go on from '.*checkpoint-2'"):
        trainer(tmp_path, adapted(), features(), **options).train(str(tmp_path / "checkpoint-3"))
    ran = trainer(tmp_path, adapted(), features(), **options)
    ran.train(resume_from_checkpoint=True)
    assert ran.state.global_step == 3
    assert last_checkpoint(tmp_path).name == "checkpoint-3"
    damage_cut(tmp_path / "checkpoint-2")
    damage_cut(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match="there is no whole checkpoint in"):
        ran.train(resume_from_checkpoint=True)


def test_two_processes_stop_together_when_one_of_them_diverges_and_keep_one_whole_checkpoint(tmp_path, unused_port):
    spawn(on_rank, unused_port, tmp_path, diverges)
    said = {(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)}
    assert len(said) == 1
    assert "the loss is not finite at step 3" in said.pop()
    assert last_checkpoint(tmp_path).name == "checkpoint-2"
    assert sorted(p.name for p in last_checkpoint(tmp_path).glob("rng*")) == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.parametrize("failure", ["memory", "bug"])
def test_whatever_ends_a_training_says_what_is_kept_and_memory_has_a_cure(place, monkeypatch, capsys, failure):
    class Fails(fit.ShowProgress):
        def on_step_begin(self, args, state, control, **_):
            if state.global_step == 2:
                torch.empty(1 << 55) if failure == "memory" else [].pop()

    monkeypatch.setattr(fit, "ShowProgress", Fails)
    error, match = (OSError, "not enough memory: lower --batch-size") if failure == "memory" else (IndexError, "pop")
    with pytest.raises(error, match=match) as caught:
        train(place)
    assert "\n" not in str(caught.value)
    assert "checkpoint-2 is kept: --resume goes on from it" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("CUDA error: out of memory"),
     RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate")],
)  # fmt: skip
def test_each_librarys_way_to_say_that_memory_is_short_is_one_line(error):
    with pytest.raises(OutOfMemory, match="not enough memory: do less"), enough_memory("do less"):
        raise error
    with pytest.raises(RuntimeError, match="shapes"), enough_memory("do less"):
        raise RuntimeError("shapes do not fit")
