"""What the rows of a cell say: the choice made, whether it is right, and how likely the right answer is.

A row has nll[c], the sum over the tokens of choice c of their negative log-likelihood in nats, and tokens[c], how many
they are. per_token=False compares the sums (lm-eval's acc), per_token=True the means nll[c] / tokens[c]. The right
choices are the label and those in also. A row of free text has the label -1 and one "choice", the gold answer.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import nan
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray


class Row(TypedDict):
    """One line of rows.jsonl.gz.

    Attributes:
        id: the task and a hash of the row, the same in all cells.
        task: its task.
        split: "test", "dev" or "unseen".
        label: the index of the right choice; -1 for free text.
        also: the indices of other right choices.
        nll: the negative log-likelihood of each choice in nats, summed over its tokens.
        tokens: the number of tokens of each choice.
        greedy: the score of the generated answer, 0 to 1; None where none was generated.
    """

    id: str
    task: str
    split: str
    label: int
    also: list[int]
    nll: list[float]
    tokens: list[int]
    greedy: float | None


def choose(row: Row, per_token: bool = False) -> tuple[int, bool]:
    """Returns the likeliest choice, and whether another is exactly as likely; among those the first is taken."""
    nll = _nll(row, per_token)
    return int(np.argmin(nll)), bool(np.sum(nll == nll.min()) > 1)


def right(row: Row, per_token: bool = False) -> float:
    """Returns 1 if the choice made is right, else 0; for free text the score of the generated answer, or NaN."""
    if row["label"] < 0:
        return nan if row["greedy"] is None else float(row["greedy"])
    return float(choose(row, per_token)[0] in _right_choices(row))


def choice_nll(row: Row, per_token: bool = False) -> float:
    """Returns -log of the right choices' share: sum over right of exp(-nll) / sum over all; NaN for free text.

    Where accuracy counts a row as right or wrong, this says by how much, so that smaller differences show.
    """
    if row["label"] < 0:
        return nan
    nll = _nll(row, per_token)
    everything, correct = np.logaddexp.reduce(-nll), np.logaddexp.reduce(-nll[_right_choices(row)])
    return float(everything - correct)


def answer_loss(row: Row) -> float:
    """Returns the negative log-likelihood of the gold answer in nats per token."""
    gold = max(row["label"], 0)
    return row["nll"][gold] / row["tokens"][gold]


def values(rows: Iterable[Row], metric: Callable[..., float], per_token: bool = False) -> NDArray[np.float64]:
    """Returns a metric of each row, [n]: metric is right, choice_nll, or answer_loss, which knows no per_token."""
    return np.array([metric(row, per_token=True) if per_token else metric(row) for row in rows], float)


def commonest_accuracy(rows: Sequence[Row]) -> float:
    """Returns the accuracy of giving one answer to all rows of a task, the best such: what chance amounts to there.

    NaN where no row has choices.
    """
    right_rows = Counter(choice for row in rows if row["label"] >= 0 for choice in _right_choices(row))
    asked = sum(row["label"] >= 0 for row in rows)
    return max(right_rows.values()) / asked if asked else nan


def _right_choices(row: Row) -> list[int]:
    return sorted({row["label"], *row["also"]})


def _nll(row: Row, per_token: bool) -> NDArray[np.float64]:
    nll = np.array(row["nll"], float)
    return nll / np.array(row["tokens"]) if per_token else nll
