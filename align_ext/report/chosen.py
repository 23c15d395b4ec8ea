"""Which cells stand for an arm: each takes its best value of the chosen axes on dev rows; and how two arms are paired.

A variant is an arm at one point of the axes that are swept and not chosen (a sweep of align_weight makes one variant
for each weight). Where nothing is swept, arms and variants are the same.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from align_ext.evaluation.rows import distinct
from align_ext.report import metrics
from align_ext.report.results import BASE, Cell, Results

Array = npt.NDArray[Any]
Point = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Scores:
    """What one cell has on each distinct row of a split (evaluation/rows.py), the copies of a row left out.

    Arrays are [n], NaN where a measure has no meaning for a row.

    Attributes:
        ids: of the rows.
        tasks: the task of each row.
        values: "choice_nll" and "accuracy" (choices compared by likelihood a token, as `align-lora eval` does),
            "choice_nll_sum" and "accuracy_sum" (by likelihood alone), "balanced" (accuracy with the weight that
            makes its mean over a task the balanced accuracy), "tie", "loss" (nats a token of the answer, free text
            alone), "exact" (score of the generated answer), "chosen" and "label" (the number of the choice
            and of the right one).
    """

    ids: list[str]
    tasks: list[str]
    values: dict[str, Array]


@dataclass(frozen=True)
class Variant:
    """An arm at one point of the swept axes.

    Attributes:
        arm: its name in the plan, or "base".
        point: the values of the swept axes that it has.
        chosen: its value of each chosen axis.
        cells: its finished cells by seed, those that diverged left out.
    """

    arm: str
    point: Point
    chosen: dict[str, Any]
    cells: dict[int | None, Cell] = field(repr=False)

    @cached_property
    def label(self) -> str:
        """Its name in tables and figures: arm (axis value)."""
        values = ", ".join(f"{axis} {shown_value(value)}" for axis, value in self.point)
        return f"{self.arm} ({values})" if values else self.arm


@dataclass(frozen=True)
class Trial:
    """One value of the chosen axes of a variant: its mean loss on dev rows and its seeds; whether it was taken."""

    arm: str
    point: Point
    values: dict[str, Any]
    loss: float | None
    seeds: int
    taken: bool
    edge: bool


def shown_value(value: Any) -> str:
    """Returns the value of an axis as text, numbers as short as they are exact to 6 digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


class Arms:
    """The variants of a study, their scores and pairs.

    Attributes:
        results: what was read.
        variants: by label, in the order of the plan; the base first, if it was scored.
        trials: what each choice was made from.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.variants: dict[str, Variant] = {}
        self.trials: list[Trial] = []
        self._scores: dict[tuple[str, str], Scores] = {}
        choose = results.plan["choose"]
        groups: dict[tuple[str, Point], dict[Point, dict[int | None, Cell]]] = {}
        for cell in results.cells.values():
            if not cell.finite:
                continue
            point = tuple((axis, value) for axis, value in cell.vary.items() if axis not in choose)
            taken = tuple((axis, value) for axis, value in cell.vary.items() if axis in choose)
            groups.setdefault((cell.arm, point), {}).setdefault(taken, {})[cell.seed] = cell
        order = [BASE, *results.arms]
        for (arm, point), candidates in sorted(groups.items(), key=lambda group: order.index(group[0][0])):
            taken = self._choose(arm, point, candidates)
            variant = Variant(arm, point, dict(taken), dict(sorted(candidates[taken].items(), key=str)))
            self.variants[variant.label] = variant

    @property
    def trained(self) -> list[Variant]:
        """All variants but the base."""
        return [variant for variant in self.variants.values() if variant.arm != BASE]

    @property
    def base(self) -> Variant | None:
        """The model without adapters, if it was scored."""
        return self.variants.get(BASE)

    def index(self, label: str) -> int:
        """Returns the place of a variant among all, which gives it its colour in every figure."""
        return [one.label for one in self.trained].index(label)

    def _choose(self, arm: str, point: Point, candidates: dict[Point, dict[int | None, Cell]]) -> Point:
        """Returns the candidate of the smallest loss on dev rows among those with the most seeds.

        A value whose training diverged with one seed, or that is not finished, is not taken for its other seeds.
        """
        if len(candidates) == 1:
            return next(iter(candidates))
        most = max(map(len, candidates.values()))
        shared = set.intersection(*(set(cells) for cells in candidates.values() if len(cells) == most))
        losses = {}
        for values, cells in candidates.items():
            of_seeds = [self._dev_loss(cell) for seed, cell in cells.items() if seed in shared or not shared]
            losses[values] = float(np.mean(of_seeds)) if of_seeds and len(cells) == most else np.inf
        best = min(candidates, key=lambda values: losses[values])
        for values, cells in candidates.items():
            edge = any(value in _ends(self.results.plan["vary"].get(axis, ())) for axis, value in values)
            loss = losses[values] if np.isfinite(losses[values]) else None
            self.trials.append(Trial(arm, point, dict(values), loss, len(cells), values == best, edge))
        return best

    def _dev_loss(self, cell: Cell) -> float:
        """Mean over tasks of the choice NLL, or of the loss a token of the answer where a task has no choices."""
        scores = self.scores(cell, "dev")
        if not scores.ids:
            return np.inf
        nll = np.where(np.isnan(scores.values["choice_nll"]), scores.values["loss"], scores.values["choice_nll"])
        tasks = np.array(scores.tasks)
        return float(np.mean([nll[tasks == task].mean() for task in dict.fromkeys(scores.tasks)]))

    def scores(self, cell: Cell, split: str) -> Scores:
        """Returns what a cell has on each distinct row of a split ("test", "dev", "unseen")."""
        if (cell.key, split) not in self._scores:
            rows = [row for row in cell.rows if row["split"] == split]
            self._scores[cell.key, split] = _measure([rows[i] for i in distinct([row["id"] for row in rows])])
        return self._scores[cell.key, split]

    def values(self, variant: Variant, split: str, measure: str, task: str | None = None) -> tuple[Array, Array]:
        """Returns one measure of a variant: [S, n] over its seeds and the rows that all have, and the tasks [n]."""
        return self._stack([list(variant.cells.values())], split, measure, task, lambda of: of[0])

    def differences(
        self, variant: Variant, other: Variant, split: str, measure: str, task: str | None = None
    ) -> tuple[Array, Array]:
        """Returns variant minus other: d [S, n] over the seeds and the rows that both have, and the tasks [n].

        The base, which has no seeds, is paired with each seed. Both are empty where nothing is shared.
        """
        one, two = variant.cells, other.cells
        if None in one or None in two:
            seeds: list[int | None] = [seed for seed in {**one, **two} if seed is not None] or [None]
            pairs = [(one.get(seed, one.get(None)), two.get(seed, two.get(None))) for seed in seeds]
        else:
            pairs = [(one[seed], two[seed]) for seed in one if seed in two]
        both = [[pair[0] for pair in pairs], [pair[1] for pair in pairs]]
        return self._stack([[c for c in cells if c] for cells in both], split, measure, task, lambda of: of[0] - of[1])

    def _stack(
        self, groups: list[list[Cell]], split: str, measure: str, task: str | None, join: Callable[[list[Array]], Array]
    ) -> tuple[Array, Array]:
        scores = [[self.scores(cell, split) for cell in cells] for cells in groups]
        everyone = [one for group in scores for one in group]
        if not everyone:
            return np.zeros((0, 0)), np.zeros(0, int)
        ids = _shared(everyone)
        of_row = dict(zip(everyone[0].ids, everyone[0].tasks, strict=True))
        tasks = np.array([of_row[one] for one in ids])
        values = join([np.array([_at(one, measure, ids) for one in group]) for group in scores])
        kept = ~np.isnan(values).any(axis=0) & (np.ones(len(ids), bool) if task is None else tasks == task)
        names, numbers, counts = np.unique(tasks[kept], return_inverse=True, return_counts=True)
        enough = counts[numbers] > 1 if len(names) else np.zeros(0, bool)  # one row says nothing of its spread
        return values[:, kept][:, enough], numbers[enough]

    def counterpart(self, variant: Variant, arm: str) -> Variant | None:
        """Returns the variant of another arm at the same point; an axis that one of them lacks does not count."""
        point = dict(variant.point)
        fits = []
        for other in self.variants.values():
            shared = [axis for axis, _ in other.point if axis in point]
            if other.arm == arm and all(dict(other.point)[axis] == point[axis] for axis in shared):
                fits.append((len(shared), other))
        return max(fits, key=lambda fit: fit[0])[1] if fits else None

    def baseline(self, variant: Variant) -> Variant | None:
        """Returns the baseline at the point of a variant, or None if it is the baseline or there is none."""
        return None if variant.arm == self.results.baseline else self.counterpart(variant, self.results.baseline)

    def tasks(self, split: str) -> list[str]:
        """Returns the tasks of a split that have rows, in the order of the plan."""
        there = {row["task"] for cell in self.results.cells.values() for row in cell.rows if row["split"] == split}
        known = self.results.plan["unseen" if split == "unseen" else "tasks"]
        return [*(task for task in known if task in there), *sorted(there.difference(known))]


def _ends(values: Iterable[Any]) -> tuple[Any, ...]:
    ordered = sorted(values) if all(isinstance(value, (int, float)) for value in values) else []
    return (ordered[0], ordered[-1]) if len(ordered) > 2 else ()  # of two, each is an end


def _shared(scores: list[Scores]) -> list[str]:
    """Returns the ids of the rows that all have, in the order of the first."""
    first = scores[0].ids
    if all(one.ids == first for one in scores):
        return first
    shared = set(first).intersection(*(one.ids for one in scores))
    return [one for one in first if one in shared]


def _at(scores: Scores, measure: str, ids: list[str]) -> Array:
    if scores.ids is ids or scores.ids == ids:
        return scores.values[measure]
    place = {one: index for index, one in enumerate(scores.ids)}
    return scores.values[measure][[place[one] for one in ids]]


def _measure(rows: list[Any]) -> Scores:
    """Returns the measures of rows; see Scores."""
    nothing = np.full(len(rows), np.nan)
    asked = np.array([row["label"] >= 0 for row in rows], bool)
    choices = [row for row in rows if row["label"] >= 0]
    values = {name: nothing.copy() for name in ("chosen", "tie", "label", "balanced", "exact", "loss")}
    for name, per_token in (("", True), ("_sum", False)):
        for measure, metric in (("accuracy", metrics.right), ("choice_nll", metrics.choice_nll)):
            values[measure + name] = nothing.copy()
            values[measure + name][asked] = metrics.values(choices, metric, per_token)
    values["label"][asked] = [row["label"] for row in choices]
    made = np.array([metrics.choose(row, per_token=True) for row in choices], float).reshape(-1, 2)
    values["chosen"][asked], values["tie"][asked] = made.T
    values["loss"][~asked] = [metrics.answer_loss(row) for row in rows if row["label"] < 0]
    values["exact"] = np.array([np.nan if row["greedy"] is None else row["greedy"] for row in rows], float)
    tasks = [row["task"] for row in rows]
    for task in dict.fromkeys(tasks):
        here = asked & (np.array(tasks) == task)
        _, numbers, counts = np.unique(values["label"][here], return_inverse=True, return_counts=True)
        values["balanced"][here] = values["accuracy"][here] * here.sum() / (len(counts) * counts[numbers])
    return Scores([row["id"] for row in rows], tasks, values)
