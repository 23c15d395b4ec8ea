"""Shows a study's plan and status as tables."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from align_ext.study.plan import CELLS
from align_ext.study.run import CellStatus, outside
from align_ext.system.reading import read_json

_OFF = 0.02  # a larger difference of parameters is pointed out
_FEW_SEEDS, _FEW_ROWS = 3, 300


def arms_table(plan: Mapping[str, Any]) -> Table:
    """Returns the arms with their ranks, scaling and trained parameters, and how far these are off the budget."""
    table = Table("arm", "architecture", "align", "control", title=f"{plan['study']}: arms")
    for title in ("rank", "scaling", "parameters", "%", "off budget", "adapter FLOPs"):
        table.add_column(title, justify="right")
    for name, arm in plan["arms"].items():
        align = "-" if arm["align"] is None else f"{arm['align']} {arm['align_weight']:g}"
        off = "-" if arm["budget_off"] is None else f"{arm['budget_off']:+.1%}"
        flops = arm["flops_per_token"]
        table.add_row(
            name, arm["architecture"], align, arm["control"] or "-", str(arm["rank"]), f"{arm['scaling']:.3g}",
            f"{arm['parameters']:,}", f"{arm['percent']:.3g}", off, f"{flops['adapters'] / flops['base']:.2%}",
        )  # fmt: skip
    return table


def rows_table(plan: Mapping[str, Any]) -> Table:
    """Returns how many rows of each task are used, and why others are left out."""
    table = Table("task", "train", "test", title="rows")
    for task, splits in {**plan["data"]["tasks"], **plan["data"]["unseen"]}.items():
        table.add_row(task, _usage(splits.get("train")), _usage(splits.get("test") or splits.get("validation")))
    return table


def _usage(usage: Mapping[str, Any] | None) -> str:
    if usage is None:
        return "-"
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in usage["left_out"].items())
    return f"{usage['used']:,} of {usage['rows']:,}" + (f" ({reasons})" if reasons else "")


def remarks(folder: Path, plan: Mapping[str, Any], found: Sequence[CellStatus]) -> Iterator[str]:
    """Yields what a plan costs as far as is known, and what will spoil its comparisons."""
    counts: dict[str, int] = {}
    for one in found:
        counts[one.state] = counts.get(one.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in counts.items())
    sizes = f"{len(plan['arms'])} arms, {len(plan['seeds'])} seeds, {plan['dtype']} on {plan['device']}"
    yield f"{len(found)} cells ({states}): {sizes}"
    files = [folder / CELLS / one.key / "cost.json" for one in found if one.state == "done"]
    done = [read_json(file) for file in files if file.is_file()]
    seconds = sorted(sum(cost["seconds"].values()) for cost in done if "train" in cost["seconds"])
    left = len(found) - counts.get("done", 0)
    if seconds:
        middle = seconds[len(seconds) // 2]
        hours = f"{left * middle / 3600:.1f}"
        yield f"about {hours} hours of one process are left: a finished cell took {middle / 60:.1f} minutes"
    elif left:
        yield "how long a cell takes is known when one is done: `align-lora study run` can be stopped at any time"
    if others := outside(folder, plan):
        yield others
    if len(plan["seeds"]) < _FEW_SEEDS:
        yield f"{len(plan['seeds'])} seeds: no interval over training runs with fewer than {_FEW_SEEDS}"
    for task, splits in plan["data"]["tasks"].items():
        used = (splits.get("test") or splits.get("validation"))["used"]
        if used < _FEW_ROWS:
            points = 100 * 1.96 * (2 * 0.25 * 0.5 / used) ** 0.5
            yield f"{task}: {used} rows; a difference below {points:.0f} points of accuracy will hardly be seen there"
    for name, arm in plan["arms"].items():
        if arm["budget_off"] is not None and abs(arm["budget_off"]) > _OFF:
            yield f"{name}: {arm['budget_off']:+.1%} parameters beside the budget: no whole rank is nearer"
    budgets = {arm["scaling"] for arm in plan["arms"].values()}
    if len(budgets) > 1:
        yield "the arms differ in their scaling s = alpha / r, which alone changes how fast they learn: equal.scaling"


def status_table(found: Sequence[CellStatus]) -> Table:
    """Returns the state of every cell."""
    table = Table("cell", "state", "step", "left", "detail")
    for one in found:
        left = "" if one.seconds_left is None else f"{one.seconds_left / 60:.0f} min"
        table.add_row(one.key, one.state, str(one.step or ""), left, one.detail)
    return table
