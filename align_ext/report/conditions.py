"""What a reader must know before the numbers: what is missing in a study, and what spoils a comparison."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from align_ext.evaluation.rows import distinct, repeats
from align_ext.report import statistics
from align_ext.report.chosen import Arms, Variant, shown_value
from align_ext.report.compared import at_chance
from align_ext.report.crossed import FEWEST_SEEDS
from align_ext.report.formats import Column, Table, number

FEWEST_ROWS = 300  # of a task; fewer separate little
BUDGET = 0.02  # how far parameters may be off
ONE_ANSWER = 0.9  # the share of a task's rows with the same answer that is worth a warning


@dataclass(frozen=True)
class Caution:
    """One warning: its kind, a whole sentence, and the things that it is about."""

    kind: str
    text: str
    about: list[str]


def cautions(arms: Arms) -> list[Caution]:
    """Returns the warnings of a study, at most one of each kind."""
    plan, results = arms.results.plan, arms.results
    seeds, used = len(plan["seeds"]), {arm: dict(about["options"]) for arm, about in results.arms.items()}
    dtypes = {arm: options.get("dtype") for arm, options in used.items()}
    rows = {task: _rows(arms, task) for task in arms.tasks("test")}
    off = {arm: about["budget_off"] for arm, about in results.arms.items() if about["budget_off"] is not None}
    found = [
        _one("missing", "Cells are missing; what stands here is about the others.", _missing(results.missing)),
        _one("seeds", f"Fewer than {FEWEST_SEEDS} seeds: intervals speak of these training runs, not of a method.",
             [f"{seeds} planned"] if seeds < FEWEST_SEEDS else []),
        _one("rows", f"Fewer than {FEWEST_ROWS} test rows: only large differences can be seen.",
             [f"{task}: {count}" for task, count in rows.items() if count < FEWEST_ROWS]),
        _one("repeated", "Repeated test rows count once.", _repeats(arms)),
        _one("parameters", "Trained parameters are off the common budget by more than 2 %.",
             [f"{arm}: {number(x, 'points', True)} %" for arm, x in off.items() if abs(x) > BUDGET]),
        _one("dtype", f"Arms were trained in another dtype than {plan['dtype']}.",
             [f"{arm}: {one}" for arm, one in dtypes.items() if one not in (None, "auto", plan["dtype"])]),
        _one("finite", "The losses of these cells are not finite; they are left out of every number.",
             [cell.key for cell in results.cells.values() if not cell.finite]),
        _one("one_answer", "An arm gives one answer to more than 90 % of a task's rows.", _one_answer(arms)),
        _one("chance", "Accuracy is at chance: it says nothing of these arms, the choice NLL may.", _at_chance(arms)),
        _one("edge", "The best value is at the edge of what was tried: a better one may lie beyond.", _edges(arms)),
        _one("mechanism", "mechanism.json of these cells cannot be read: delete it, and `study run` looks again.",
             [cell.key for cell in results.cells.values() if cell.content["mechanism"] == {}]),
        _one("hosts", "Times of different machines or numbers of threads are not compared.", _hosts(arms)),
    ]  # fmt: skip
    return [one for one in found if one is not None]


def _one(kind: str, text: str, about: list[str]) -> Caution | None:
    return Caution(kind, text, about) if about else None


def _missing(missing: dict[str, str]) -> list[str]:
    waiting = [key for key, reason in missing.items() if reason == "not finished yet"]
    shown = waiting if len(waiting) <= 12 else [*waiting[:12], f"and {len(waiting) - 12} more"]
    return [*shown, *(f"{key}: {reason}" for key, reason in missing.items() if reason != "not finished yet")]


def _rows(arms: Arms, task: str) -> int:
    """Returns how many test rows of a task the cells have that were trained on it; the fewest of them."""
    cells = [cell for variant in arms.variants.values() for cell in variant.cells.values()]
    return min((count for cell in cells if (count := arms.scores(cell, "test").tasks.count(task))), default=0)


def _repeats(arms: Arms) -> list[str]:
    """Returns how many test rows of each task repeat others, those of all cells together."""
    cells = arms.results.cells.values()
    tasks = {row["id"]: row["task"] for cell in cells for row in cell.rows if row["split"] == "test"}
    ids = list(tasks)
    counted = Counter(tasks[ids[i]] for i in distinct(ids))
    found = Counter(tasks.values())
    return repeats({task: {"examples": counted[task], "repeated": found[task] - counted[task]} for task in found})


def _one_answer(arms: Arms) -> list[str]:
    found = []
    for variant in arms.variants.values():
        for task in arms.tasks("test"):
            share = commonest(arms, variant, task)
            if share is not None and share > ONE_ANSWER:
                found.append(f"{variant.label}, {task}: {number(share, 'share')}")
    return found


def commonest(arms: Arms, variant: Variant, task: str, split: str = "test") -> float | None:
    """Returns the share of a task's rows with the answer that the variant gives most; the mean over seeds."""
    chosen, _ = arms.values(variant, split, "chosen", task)
    return float(np.mean([statistics.commonest_share(one.astype(int)) for one in chosen])) if chosen.size else None


def chance_tasks(arms: Arms, variant: Variant) -> list[str]:
    """Returns the tasks on which a variant's balanced accuracy is not separable from that of one answer to all rows."""
    found = []
    for task in arms.tasks("test"):
        right, _ = arms.values(variant, "test", "balanced", task)
        labels, _ = arms.values(variant, "test", "label", task)
        if right.shape[1] > 1 and at_chance(right, len(np.unique(labels))):
            found.append(task)
    return found


def _at_chance(arms: Arms) -> list[str]:
    tasks = {variant.label: chance_tasks(arms, variant) for variant in arms.trained}
    return [f"{label}: {', '.join(names)}" for label, names in tasks.items() if names]


def _edges(arms: Arms) -> list[str]:
    taken = [trial for trial in arms.trials if trial.taken and trial.edge]
    return list(dict.fromkeys(f"{trial.arm}: {point(trial.values)}" for trial in taken))


def _hosts(arms: Arms) -> list[str]:
    cells = [cell for one in arms.trained for cell in one.cells.values()]
    places = {cell.place for cell in cells if cell.place is not None}
    return sorted(f"{host}, threads: {threads}" for host, threads in places) if len(places) > 1 else []


def point(values: dict[str, Any] | Iterable[tuple[str, Any]]) -> str:
    """Returns values of axes as text: lr 0.0002, rank 8."""
    return ", ".join(f"{axis} {shown_value(value)}" for axis, value in dict(values).items())


def facts(arms: Arms) -> list[tuple[str, str]]:
    """Returns the conditions of a study as names and values."""
    plan = arms.results.plan
    axes = [f"{axis}: {', '.join(map(shown_value, values))}" for axis, values in plan["vary"].items()]
    chosen = f" (each arm takes its best {', '.join(plan['choose'])} on dev rows)" if plan["choose"] else ""
    done, all_cells = len(arms.results.cells), len(plan["cells"])
    return [
        ("Study", plan["study"]),
        ("Cells", f"{done} of {all_cells} finished"),
        ("Seeds", ", ".join(map(str, plan["seeds"]))),
        ("Axes", "; ".join(axes) + chosen if axes else "none"),
        ("Precision, device", f"{plan['dtype']}, {plan['device']}"),
        ("Base parameters", number(plan["base_parameters"], "count")),
        ("Margin", f"{number(plan['margin'], 'points')} points of accuracy count as none"),
        ("Data", str(plan["data"].get("digest", ""))[:16]),
        ("Versions", ", ".join(f"{name} {version}" for name, version in plan["versions"].items())),
    ]


def data_table(arms: Arms) -> Table | None:
    """Returns the rows of each task: how many were there, used, repeated and left out, and why."""
    rows = []
    for task, splits in arms.results.plan["data"].get("tasks", {}).items():
        for split, about in splits.items():
            left_out = about.get("left_out", {})
            why = "; ".join(f"{reason}: {number(count, 'count')}" for reason, count in left_out.items())
            row = {"task": task, "split": split, **{key: about.get(key) for key in ("rows", "used", "repeated")}}
            rows.append(row | {"left_out": sum(left_out.values()), "why": why})
    columns = [
        Column("task", "task"), Column("split", "split"), Column("rows", "rows", "count"),
        Column("used", "used", "count"), Column("repeated", "repeated", "count"),
        Column("left_out", "left out", "count"), Column("why", "why"),
    ]  # fmt: skip
    caption = " ".join(["Rows of each task.", *map(str, arms.results.plan["data"].get("notes", []))])
    return Table("data", "Rows", caption, columns, rows, folded=True) if rows else None
