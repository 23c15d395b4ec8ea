"""Shows a run: its progress, the tables of its results, and the plot of its losses."""

from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from align_ext.evaluation.same_logits import verdict
from align_ext.system.terminal import print_line
from align_ext.system.writing import atomic_file


class ShowProgress(transformers.TrainerCallback):
    """Shows the optimizer steps by a progress bar, or by lines if there is no terminal."""

    def __init__(self, bars: Progress, console: Console, steps: int) -> None:
        self.bars, self.console = bars, console
        self.task = bars.add_task("training", total=steps)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sets the bar to the steps that are already done."""
        self.bars.update(self.task, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        self.bars.advance(self.task)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        """Shows the losses."""
        if "eval_loss" in logs and self.bars.disable:
            print_line(
                self.console, f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.3f}"
            )
        if "lm_loss" not in logs:
            return
        text = f"loss {logs['lm_loss']:.3f}"
        for name in ("align", "balance", "spectral"):
            if f"{name}_loss" in logs:
                text += f", {name} {logs[f'{name}_loss']:.3g}"
        self.bars.update(self.task, description=f"training  {text}")
        if self.bars.disable:
            print_line(self.console, f"step {state.global_step}/{state.max_steps}  {text}")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removes the bar."""
        self.bars.remove_task(self.task)


def summarise(results: dict[str, Any], target: Path, console: Console) -> None:
    """Prints the results of a run of `train`."""
    table = Table("task", title="held-out examples, before -> after training")
    for title in ("examples", "loss", "score"):
        table.add_column(title, justify="right")
    before, after = results["before"], results["after"]
    for name, old in before["tasks"].items():
        new = after["tasks"][name]
        table.add_row(
            name,
            str(old["examples"]),
            f"{old['loss']:.3f} -> {new['loss']:.3f}",
            "-" if old["score"] is None else f"{old['score']:.2f} -> {new['score']:.2f}",
        )
    console.print(table)
    if before["align"] is not None:
        print_line(console, f"alignment loss {before['align']:.4g} -> {after['align']:.4g}")
    for name, check in results["checks"].items():
        result = check["detail"] or verdict(check["difference"], passed=check["passed"])
        print_line(console, f"{name}: " + ("does not apply: " if check["passed"] is None else "") + result)
    if results["plot"] is None:
        print_line(console, "no loss plot: matplotlib is not installed")
    times = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in results["seconds"].items())
    print_line(console, f"wrote {target} ({times})")


def plot_losses(losses: list[dict[str, float]], file: Path) -> str | None:
    """Draws the logged losses over the steps; returns the file's name, or None without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    steps = [entry["step"] for entry in losses]
    for name in sorted({key for entry in losses for key in entry if key.startswith("loss/")} | {"lm_loss"}):
        style = {"color": "black", "linewidth": 2} if name == "lm_loss" else {"alpha": 0.7}
        left.plot(steps, [entry.get(name, float("nan")) for entry in losses], label=name.removeprefix("loss/"), **style)
    left.set(xlabel="step", ylabel="loss per answer token")
    left.legend(fontsize="small")
    right.plot(steps, [entry.get("align_loss", float("nan")) for entry in losses], color="black")
    right.set(xlabel="step", ylabel="alignment loss")
    with atomic_file(file) as new:
        figure.savefig(new, dpi=120)
    return file.name
