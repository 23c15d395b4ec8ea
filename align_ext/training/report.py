"""Shows a run in the terminal: its progress, and the table of its results."""

import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.table import Table

from align_ext.evaluation.rows import repeats_line
from align_ext.evaluation.same_logits import verdict
from align_ext.system.memory import peak_memory, shown_bytes
from align_ext.system.terminal import Bars, print_line, print_table
from align_ext.training.in_words import shown_steps, shown_times

_MOST_TASKS = 6  # whose losses stand in a line


class ShowProgress(transformers.TrainerCallback):
    """Shows the optimizer steps by a progress bar, or by lines if there is no terminal.

    Args:
        bars: the running display.
        console: gets the lines.
        steps: the number of steps of the whole run.
        device: "cpu" or "cuda", whose memory is shown.
        tokens: the mean number of trained tokens in a step.
    """

    def __init__(self, bars: Bars, console: Console, steps: int, device: str, tokens: float) -> None:
        self.bars, self.console, self.device, self.tokens = bars, console, device, tokens
        self.task = bars.add_task("training", total=steps)
        self._tasks: dict[str, float] = {}
        self._begun, self._first = 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sets the bar to the steps that are already done."""
        self._begun, self._first = time.perf_counter(), state.global_step
        self.bars.update(self.task, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        self.bars.advance(self.task)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Shows the losses, and what the training costs."""
        if "eval_loss" in logs:
            by_task = _by_task(logs, "eval_loss/")
            self._print(state, f"held-out loss {logs['eval_loss']:.3f}{by_task and f' ({by_task})'}")
        if "lm_loss" not in logs:
            return
        text = f"loss {logs['lm_loss']:.3f}"
        for name in ("align", "balance", "spectral", "orth"):
            if f"{name}_loss" in logs:
                text += f", {name} {logs[f'{name}_loss']:.3g}"
        self._tasks |= {name: value for name, value in logs.items() if name.startswith("loss/")}
        cost = self._cost(state.log_history[-1].get("step_seconds"))
        self.bars.update(self.task, description=f"training  {text}")
        self.bars.note = "\n".join(filter(None, (_by_task(self._tasks, "loss/"), cost)))
        by_task = _by_task(logs, "loss/")
        costs = ", ".join(filter(None, (cost, self._time_left(state))))
        self._print(state, f"{text}  {costs}{by_task and f'  ({by_task})'}")

    def _print(self, state: Any, text: str) -> None:
        if self.bars.disable:
            print_line(self.console, f"step {state.global_step}/{state.max_steps}  {text}")

    def _cost(self, step_seconds: float | None) -> str:
        speed = f"{self.tokens / step_seconds:,.0f} tokens/s, " if step_seconds else ""
        return f"{speed}{shown_bytes(peak_memory(self.device))}"

    def _time_left(self, state: Any) -> str:
        done = state.global_step - self._first
        if not done or state.global_step == state.max_steps:
            return ""
        left = (time.perf_counter() - self._begun) / done * (state.max_steps - state.global_step)
        return f"{timedelta(seconds=round(left))} left"

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removes the bar."""
        self.bars.note = ""
        self.bars.remove_task(self.task)


def _by_task(logs: Mapping[str, float], prefix: str) -> str:
    """Returns the losses of the tasks; empty for one task, which says the same as all, and for many."""
    losses = {name.removeprefix(prefix): loss for name, loss in sorted(logs.items()) if name.startswith(prefix)}
    return ", ".join(f"{name} {loss:.2f}" for name, loss in losses.items()) if 2 <= len(losses) <= _MOST_TASKS else ""


def summarise(results: dict[str, Any], target: Path, console: Console) -> None:
    """Prints the results of a run of `train`."""
    table = Table("task", title="held-out examples, before -> after training")
    for title in ("examples", "loss", "score"):
        table.add_column(title, justify="right")
    before, after = results["before"], results["after"]
    if (steps := shown_steps(results)) != shown_steps({"options": results["options"]}):
        print_line(console, f"trained {steps}")
    for name, old in before["tasks"].items():
        new = after["tasks"][name]
        table.add_row(
            name,
            str(old["examples"]),
            f"{old['loss']:.3f} -> {new['loss']:.3f}",
            "-" if old["score"] is None else f"{old['score']:.2f} -> {new['score']:.2f}",
        )
    print_table(console, table)
    if line := repeats_line(after["tasks"]):
        print_line(console, line)
    if before["align"] is not None:
        print_line(console, f"alignment loss {before['align']:.4g} -> {after['align']:.4g}")
    for name, check in results["checks"].items():
        result = check["detail"] or verdict(check["difference"], passed=check["passed"])
        print_line(console, f"{name}: " + ("does not apply: " if check["passed"] is None else "") + result)
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in shown_times(results).items())
    print_line(console, f"wrote {target} ({times})")
