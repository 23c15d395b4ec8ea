"""A finished training run as it lies in its folder: results.json, and what changed in each held-out row.

Needs no model. The rows before and after training are the same, so that differences are paired by row: the errors are
of the distinct rows alone (evaluation/rows.py), of one run with one seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from align_ext.evaluation.rows import ROWS, distinct
from align_ext.report import metrics, statistics
from align_ext.report.crossed import Floats
from align_ext.report.statistics import Difference
from align_ext.system.messages import reason_of, shown_path
from align_ext.system.reading import MEBIBYTE, exists, parse_json, read_lines, read_text
from align_ext.training.in_words import adapter_step

_LARGEST = 256 * MEBIBYTE  # of results.json, which holds the losses of every logged step
_LEAST_ROWS = 6  # that can show a change at 95%: 2 / 2 ** 6 < 0.05
Row = metrics.Row


@dataclass(frozen=True)
class TaskChange:
    """What training changed on the held-out rows of a task.

    Attributes:
        task: its name.
        before: its TaskScore before training, as results.json has it.
        after: that after training.
        loss: the change of the loss a token; None for a single row, or a loss that is not finite.
        score: the change of the score; None for a single row, or where nothing was scored.
    """

    task: str
    before: dict[str, Any]
    after: dict[str, Any]
    loss: Difference | None
    score: Difference | None


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: that of its folder.
        results: results.json as it is.
        changes: those of each task; empty if the run ended before its scores.
        loss: the mean over the tasks of the changes of the loss; None without such.
        score: the same of the scores.
        ids: the ids of the held-out rows, in the order in which they were scored.
    """

    name: str
    results: dict[str, Any]
    changes: list[TaskChange]
    loss: Difference | None
    score: Difference | None
    ids: list[str] = field(default_factory=list)

    @property
    def losses(self) -> list[dict[str, float]]:
        """The logged losses of training, in the order of the steps."""
        return list(self.results["losses"])

    @property
    def options(self) -> dict[str, Any]:
        """All options of the run."""
        return dict(self.results["options"])

    def measures(self) -> list[tuple[int, dict[str, Any]]]:
        """Returns what was measured of the adapters before, during and after training, each with its step."""
        during = [(int(one["step"]), dict(one["adapters"])) for one in self.results.get("measures", [])]
        end = adapter_step(self.results)
        found = [(0, self.probe("before")), *(one for one in during if one[0] != end), (end, self.probe("after"))]
        return sorted(found, key=lambda one: one[0])

    def probe(self, when: str) -> dict[str, Any]:
        """Returns what was measured of the adapters "before" or "after" training; empty if nothing was."""
        return dict(self.results.get(when, {}).get("adapters") or {})


def is_beyond_noise(change: Difference | None) -> bool:
    """Whether a change is called one: both 95% intervals are without 0, as for the arms of a study with one seed.

    Five rows are never enough: if nothing had changed, all of them would go one way in 1 of 16 runs (sign test).
    """
    if change is None or change.rows < _LEAST_ROWS:
        return False
    return min(change.low, change.closed_low) > 0 or max(change.high, change.closed_high) < 0


def read_run(folder: Path) -> Run:
    """Reads a run's folder.

    Raises:
        ValueError: it holds no finished run, or a file is damaged; the message names it.
    """
    file = folder / "results.json"
    if not exists(file):
        raise ValueError(f"{shown_path(folder)} holds no finished run of `align-lora train`: {file.name} is missing")
    try:
        results = parse_json(read_text(file, _LARGEST))
        for name, kind in (("options", dict), ("losses", list), ("data", dict), ("adapters", dict), ("model", dict)):
            if not isinstance(results[name], kind):
                raise ValueError(f"{name} is no {kind.__name__}")
        rows = _rows(folder / ROWS) if "after" in results else {"before": [], "after": []}
        changes = [_change(task, results, rows) for task in results.get("after", {}).get("tasks", {})]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the run in {shown_path(folder)} is damaged: {reason_of(error)}") from error
    ids = [row["id"] for row in rows["after"]]
    return Run(folder.resolve().name, results, changes, *changes_of(rows["before"], rows["after"]), ids)


def _rows(file: Path) -> dict[str, list[Row]]:
    """Returns the rows before and after training, both in one order."""
    rows: dict[str, list[Row]] = {"before": [], "after": []}
    for number, line in read_lines(file):
        row = parse_json(line)
        if not isinstance(row, dict) or not {"when", "id", "task", "label", "nll", "tokens"} <= row.keys():
            raise ValueError(f"line {number} of {file.name} is no row of a run")
        rows[row["when"]].append(row)  # type: ignore[arg-type]
    if [row["id"] for row in rows["before"]] != [row["id"] for row in rows["after"]]:
        raise ValueError(f"{file.name} holds other rows before training than after it")
    return rows


def _change(task: str, results: dict[str, Any], rows: dict[str, list[Row]]) -> TaskChange:
    before, after = ([row for row in rows[when] if row["task"] == task] for when in ("before", "after"))
    scores = results["before"]["tasks"][task], results["after"]["tasks"][task]
    return TaskChange(task, *scores, *changes_of(before, after))


def changes_of(before: list[Row], after: list[Row]) -> tuple[Difference | None, Difference | None]:
    """Returns the changes of the loss a token and of the score between two scorings of the same rows.

    Each is paired by distinct row: the mean over the tasks, or None for a single row, or where nothing was scored.
    """
    return _overall(before, after, _losses), _overall(before, after, _scores)


def _overall(before: list[Row], after: list[Row], changes: Any) -> Difference | None:
    """Returns the mean over tasks of what changed in distinct rows; tasks of one, or without numbers, are left out."""
    kept_rows = distinct([row["id"] for row in before])
    before, after = ([rows[i] for i in kept_rows] for rows in (before, after))
    kept: list[Floats] = []
    for task in dict.fromkeys(row["task"] for row in before):
        pairs = [(one, other) for one, other in zip(before, after, strict=True) if one["task"] == task]
        values = changes([one for one, _ in pairs], [other for _, other in pairs])
        if len(values) > 1 and np.isfinite(values).all():
            kept.append(values)
    if not kept:
        return None
    tasks: NDArray[np.int64] = np.repeat(np.arange(len(kept)), [len(values) for values in kept])
    return statistics.compare(np.concatenate(kept)[None], tasks)


def _losses(before: Sequence[Row], after: Sequence[Row]) -> Floats:
    """Returns values whose mean is the change of the task's loss a token, and whose error is that of this ratio.

    TaskScore's loss is a ratio, of the sum of the rows' nll and the sum of their tokens. With d_i the change of nll,
    t_i the tokens and R = sum d / sum t, the values are R + (d_i - R t_i) / mean(t): linearised, as its standard error.
    """
    gold = [max(row["label"], 0) for row in before]
    d = np.array([b["nll"][i] - a["nll"][i] for a, b, i in zip(before, after, gold, strict=True)], float)
    t = np.array([row["tokens"][i] for row, i in zip(before, gold, strict=True)], float)
    ratio = d.sum() / t.sum()
    return np.asarray(ratio + (d - ratio * t) / t.mean())


def _scores(before: Sequence[Row], after: Sequence[Row]) -> Floats:
    """Returns the change of each row's score."""
    return metrics.values(after, metrics.right, per_token=True) - metrics.values(before, metrics.right, per_token=True)
