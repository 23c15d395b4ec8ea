"""What a run shows while it trains: losses of all and by task, tokens a second, memory, the time that is left."""

import io
import re

import pytest
from hf.runs import run
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from align_ext.system.memory import shown_bytes
from align_ext.system.terminal import progress_bars
from align_ext.training import report
from align_ext.training.report import ShowProgress

LOGS = {"loss": 2.0, "lm_loss": 1.5, "align_loss": 0.25}


def shown(monkeypatch, logs, *, terminal=False, done=0, step=5, seconds=0.5):
    """What a callback prints, or shows on a terminal, of a log after some steps of 20, each of half a second."""
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, color_system=None)
    clock = [100.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(report, "peak_memory", lambda device: 3 << 29)
    with progress_bars(console) as bars:
        callback = ShowProgress(bars, console, 20, "cpu", tokens=600.0)
        state = TrainerState(max_steps=20, global_step=done)
        state.log_history = [logs | ({"step_seconds": seconds} if seconds else {})]
        callback.on_train_begin(TrainingArguments, state, TrainerControl())
        clock[0] += 0.5 * (step - done)
        state.global_step = step
        callback.on_log(TrainingArguments, state, TrainerControl(), logs=logs)
        drawn = list(bars.get_renderables())
        callback.on_train_end(TrainingArguments, state, TrainerControl())
        gone = list(bars.get_renderables())
    assert len(gone) == 1
    return [str(one) for one in drawn[1:]] if terminal else console.file.getvalue()


def test_a_line_by_hand(monkeypatch):
    logs = LOGS | {"loss/b": 1.0, "loss/a": 2.0}
    text = "step 5/20  loss 1.500, align 0.25  1,200 tokens/s, 1.5 GiB, 0:00:08 left  (a 2.00, b 1.00)\n"
    assert shown(monkeypatch, logs) == text


def test_a_resumed_run_counts_its_own_steps_and_the_last_step_has_no_time_left(monkeypatch):
    assert "0:00:05 left" in shown(monkeypatch, LOGS, done=8, step=10)
    assert "left" not in shown(monkeypatch, LOGS, step=20)


def test_a_step_without_a_time_has_no_speed(monkeypatch):
    assert "tokens" not in shown(monkeypatch, LOGS, seconds=None)


def test_the_losses_of_many_tasks_or_of_one_stand_nowhere(monkeypatch):
    for count in (1, 7):
        logs = LOGS | {f"loss/{i}": 1.0 for i in range(count)}
        assert "(" not in shown(monkeypatch, logs)
    assert "(" in shown(monkeypatch, LOGS | {f"loss/{i}": 1.0 for i in range(6)})


def test_a_terminal_shows_them_below_the_bar(monkeypatch):
    logs = LOGS | {"loss/[b]": 1.0, "loss/a": 2.0}
    assert shown(monkeypatch, logs, terminal=True) == ["[b] 1.00, a 2.00\n1,200 tokens/s, 1.5 GiB"]


def test_held_out_losses_have_their_tasks(monkeypatch):
    said = shown(monkeypatch, {"eval_loss": 1.25, "eval_loss/a": 1.0, "eval_loss/b": 1.5})
    assert said == "step 5/20  held-out loss 1.250 (a 1.00, b 1.50)\n"


def test_a_run_shows_them(place):
    results, said = run(place, steps=3, log_steps=1, eval_steps=3)
    lines = [line for line in said.splitlines() if line.startswith("step ") and "loss" in line]
    assert len(lines) == 4
    number = r"[\d,]+"
    for line in lines[:2]:
        assert re.search(rf"loss \d\.\d{{3}}, align \S+  {number} tokens/s, \S+ [MG]iB, 0:00:\d\d left  \(next", line)
    assert re.search(r"held-out loss \d\.\d{3} \(next \d\.\d\d, threes \d\.\d\d\)$", lines[3])
    per_step = results["cost"]["tokens_per_second"] * results["cost"]["step_seconds"][1]
    shown_speed = float(re.search(rf"({number}) tokens/s", lines[0])[1].replace(",", ""))
    assert shown_speed * results["losses"][0]["step_seconds"] == pytest.approx(per_step, rel=0.01)


def test_bytes_as_text():
    assert [shown_bytes(x) for x in (0, 3 << 19, 1 << 30, 5 << 29)] == ["0 KiB", "2 MiB", "1.0 GiB", "2.5 GiB"]
