"""The results of rows and of tasks, and the file of row results."""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from align_ext.system.messages import shown
from align_ext.system.writing import atomic_file

ROWS = "rows.jsonl.gz"  # beside the main file of a run or a cell
_COPY = re.compile(r"#\d+$")  # what row_ids puts behind the id of a row that repeats another
_MOST_NAMED = 8


def distinct(ids: Sequence[str]) -> list[int]:
    """Returns the positions of the rows that count in results, errors and tests: the first of each content.

    Rows of one task that ask and answer the same are one piece of evidence: a model gives all of them the same
    result, up to rounding, so that their number says nothing of other rows.

    Args:
        ids: the id of each row (row_ids).
    """
    first: dict[str, int] = {}
    for position, name in enumerate(ids):
        first.setdefault(_COPY.sub("", name), position)
    return list(first.values())


@dataclass(frozen=True)
class RowScore:
    """The result of one example.

    Attributes:
        id: the row's id (row_ids).
        task: the name of its task.
        label: the index of the right choice, -1 for free text.
        also: the indices of other right choices.
        nll: the negative log-likelihood of each choice, or of the gold answer, summed over its tokens; nats.
        tokens: the number of tokens of each of them, with the end token.
        greedy: the score of the generated answer in [0, 1]; None: none was generated.
        text: the generated answer, which write_rows leaves out.
    """

    id: str
    task: str
    label: int
    also: tuple[int, ...]
    nll: tuple[float, ...]
    tokens: tuple[int, ...]
    greedy: float | None = None
    text: str | None = field(default=None, compare=False)

    @property
    def gold(self) -> tuple[float, int]:
        """The negative log-likelihood of the gold answer and the number of its tokens."""
        return self.nll[max(self.label, 0)], self.tokens[max(self.label, 0)]

    @property
    def choice(self) -> int | None:
        """The index of the choice with the smallest negative log-likelihood per token; None for free text."""
        if self.label < 0:
            return None
        per_token = [nll / count for nll, count in zip(self.nll, self.tokens, strict=True)]
        return per_token.index(min(per_token))

    @property
    def right(self) -> float | None:
        """Whether that choice is right; None for free text."""
        return None if self.choice is None else float(self.choice in (self.label, *self.also))

    @property
    def score(self) -> float | None:
        """Whether the choice is right, or else the score of the generated answer."""
        return self.greedy if self.right is None else self.right


@dataclass(frozen=True)
class TaskScore:
    """The result of one task over its distinct rows, of which each counts once however often it is there.

    The standard errors take these rows as a sample, and are None for a single one.

    Attributes:
        loss: negative log-likelihood of the gold answer per token, over all answer tokens of the task.
        score: the fraction of right choices, or the mean score of generated answers; None if none were generated.
        examples: the number of distinct scored examples.
        loss_error: standard error of the loss as a ratio, sqrt(n / (n - 1) Σ (nll_i - loss tokens_i)²) / Σ tokens_i.
        score_error: standard error of the score, s / sqrt(n).
        greedy: the mean score of generated answers if score is about choices; only on request.
        greedy_error: the standard error of greedy.
        repeated: how many further scored rows repeat one of the examples.
    """

    loss: float
    score: float | None
    examples: int
    loss_error: float | None = None
    score_error: float | None = None
    greedy: float | None = None
    greedy_error: float | None = None
    repeated: int = 0

    @classmethod
    def of(cls, rows: Sequence[RowScore]) -> TaskScore:
        """Computes the result of the rows of one task."""
        scored, rows = len(rows), [rows[i] for i in distinct([row.id for row in rows])]
        gold, n = [row.gold for row in rows], len(rows)
        tokens = sum(count for _, count in gold)
        loss = sum(nll for nll, _ in gold) / tokens
        residuals = sum((nll - loss * count) ** 2 for nll, count in gold)
        scores = [row.score for row in rows]
        chosen = any(row.right is not None for row in rows)
        return cls(
            loss, *_mean(scores)[:1], n, math.sqrt(residuals * n / (n - 1)) / tokens if n > 1 else None,
            *_mean(scores)[1:], *(_mean([row.greedy for row in rows]) if chosen else (None, None)), scored - n,
        )  # fmt: skip


def _mean(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    """Returns mean_and_error, or None twice if a value is missing."""
    known = [value for value in values if value is not None]
    return mean_and_error(known) if len(known) == len(values) else (None, None)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and its standard error s / sqrt(n), s² = Σ (x - mean)² / (n - 1), None for one value."""
    n, mean = len(values), sum(values) / len(values)
    return mean, math.sqrt(sum((x - mean) ** 2 for x in values) / (n * (n - 1))) if n > 1 else None


def task_scores(rows: Sequence[RowScore]) -> dict[str, TaskScore]:
    """Returns the result of each task, in the order of their first rows."""
    names = dict.fromkeys(row.task for row in rows)
    return {task: TaskScore.of([row for row in rows if row.task == task]) for task in names}


def repeats(tasks: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns "task: 12 of 200" for each task with scored rows that repeat others, from TaskScores as dictionaries."""
    found = [
        f"{shown(task)[1:-1]}: {one['repeated']:,} of {one['examples'] + one['repeated']:,}"
        for task, one in tasks.items()
        if one.get("repeated")
    ]
    more = [f"{len(found) - _MOST_NAMED} more tasks"] if len(found) > _MOST_NAMED + 1 else []
    return [*found[: _MOST_NAMED if more else None], *more]


def repeats_line(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns one line on the scored rows that repeat others, or ""."""
    found = repeats(tasks)
    return f"repeated rows count once ({', '.join(found)})" if found else ""


def rows_digest(folder: Path) -> dict[str, str]:
    """Returns what the main file of a folder holds of its file of rows: the file's name, and its SHA-256."""
    return {ROWS: hashlib.sha256((folder / ROWS).read_bytes()).hexdigest()}


def check_rows(folder: Path, content: Mapping[str, Any]) -> None:
    """Checks that the file of rows is the one that was written with a folder's main file, if that holds its digest.

    Raises:
        ValueError: it is not.
    """
    try:
        changed = "sha256" in content and content["sha256"] != rows_digest(folder)
    except OSError as error:
        raise ValueError(f"{ROWS} cannot be read: {error.strerror}") from error
    if changed:
        raise ValueError(f"{ROWS} is not the file that was written with these results")


def write_rows(file: Path, rows: Mapping[str, Sequence[RowScore]], key: str) -> None:
    """Writes rows as gzipped JSON lines, the same bytes for the same rows.

    Args:
        file: the file, whose name ends in .jsonl.gz.
        rows: groups of rows.
        key: the column that gets the name of a row's group.
    """
    lines = [
        json.dumps({key: group} | {name: value for name, value in asdict(row).items() if name != "text"}) + "\n"
        for group, members in rows.items()
        for row in members
    ]
    with atomic_file(file) as new:
        new.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
