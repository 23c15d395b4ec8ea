"""Differences between two arms of a study: intervals, tests, and what the study could have seen.

The errors are over rows and seeds at once (crossed.py says how, and how honest they were found to be).
Sources: 2411.00640 (errors of evaluations), Holm 1979, Schuirmann 1987 (two one-sided tests), McNemar 1947.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, exp, inf, log, sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from align_ext.report.crossed import FEWEST_SEEDS, Floats, Parts, bootstrap, parts_of


@dataclass(frozen=True)
class Difference:
    """An estimate with its interval; the formulas are those of crossed.py.

    Attributes:
        estimate: the mean over tasks of means over rows and seeds.
        low: the lower end of the bootstrap's interval.
        high: its upper end.
        error: the standard error, sqrt(error_rows^2 + error_seeds^2), and not less than with the same seeds again.
        error_rows: the part of the rows; with fewer than 3 seeds it holds the noise too, and is the error of these
            training runs.
        error_seeds: the part of the seeds, noise of single rows included; None with fewer than 3 seeds.
        p: two-sided, of a difference of 0, from the closed form; None with fewer than 3 seeds, or for a plain mean.
        closed_low: the lower end of the closed form's interval.
        closed_high: its upper end.
        seeds: the number of seeds.
        rows: the number of rows.
        error_noise: the part of error_seeds that more rows reduce.
        degrees_rows: the degrees of freedom of error_rows.
    """

    estimate: float
    low: float
    high: float
    error: float
    error_rows: float
    error_seeds: float | None
    p: float | None
    closed_low: float
    closed_high: float
    seeds: int
    rows: int
    error_noise: float = 0.0
    degrees_rows: float = inf


def compare(
    d: Floats,
    tasks: NDArray[np.int64],
    *,
    cluster: bool = False,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Difference:
    """Estimates the difference between an arm and its baseline.

    Args:
        d: arm minus baseline, [S seeds, n rows]; the rows are the same in all seeds.
        tasks: the task of each row, [n].
        cluster: the tasks are a sample of tasks and are resampled, instead of rows of the given tasks.
        level: the coverage of the intervals.
        resamples: the number of the bootstrap's resamples.
        seed: the bootstrap's seed; the same input gives the same output.

    Raises:
        ValueError: shapes disagree, d is not finite, a task has one row, or cluster=True has one task.
    """
    d, tasks = np.asarray(d, float), np.asarray(tasks)
    if d.ndim != 2 or tasks.shape != d.shape[1:] or d.size == 0:
        raise ValueError(f"d has the shape {d.shape} and tasks {tasks.shape}: give [seeds, rows] and [rows]")
    if not np.isfinite(d).all():
        raise ValueError(f"d has {np.sum(~np.isfinite(d))} values that are not finite: leave such rows out in all arms")
    blocks = [d[:, tasks == task] for task in np.unique(tasks)]
    if cluster:
        blocks = [np.stack([block.mean(1) for block in blocks], 1)]
    if min(block.shape[1] for block in blocks) < 2:
        what = "cluster=True has one task" if cluster else "tasks has a task of one row"
        raise ValueError(f"{what}, which says nothing about its spread: give it two or more, or leave it out")
    estimate, parts, seeds = float(np.mean([block.mean() for block in blocks])), parts_of(blocks), len(d)
    tail = (1 - level) / 2
    low, high = bootstrap(blocks, parts, tail, resamples, np.random.default_rng(seed))
    reach = parts.half_width(tail)
    return Difference(
        estimate=estimate,
        low=estimate + low,
        high=estimate + high,
        error=sqrt(parts.variance),
        error_rows=sqrt(parts.rows),
        error_seeds=sqrt(parts.seeds) if seeds >= FEWEST_SEEDS else None,
        p=min(1.0, 2 * parts.tail(abs(estimate))) if seeds >= FEWEST_SEEDS else None,
        closed_low=estimate - reach,
        closed_high=estimate + reach,
        seeds=seeds,
        rows=d.shape[1],
        error_noise=sqrt(parts.noise),
        degrees_rows=parts.degrees_rows,
    )


def interval(x: Floats, tasks: NDArray[np.int64], **options: Any) -> Difference:
    """Estimates the mean over tasks of an arm's own values x [S seeds, n rows]: as compare, without a p."""
    return replace(compare(x, tasks, **options), p=None)


def holm(p: Sequence[float | None]) -> list[float | None]:
    """Adjusts the p-values of one table (Holm 1979): those at most alpha keep the family-wise error rate below alpha.

    The k-th smallest of m is multiplied by m - k + 1, is at least the one before, and at most 1. None (not tested)
    stays None and does not count.
    """
    order = sorted((value, i) for i, value in enumerate(p) if value is not None)
    adjusted: list[float | None] = [None] * len(p)
    largest = 0.0
    for rank, (value, i) in enumerate(order):
        adjusted[i] = largest = max(largest, min(1.0, (len(order) - rank) * value))
    return adjusted


def equivalence(difference: Difference, margin: float) -> float | None:
    """Returns the p of "the true difference is within (-margin, margin)", by two one-sided tests (Schuirmann 1987).

    The larger of both sides' p, from the closed form; at most alpha just where the closed form's interval of level
    1 - 2 alpha lies within the margin. None with fewer than 3 seeds, and where no row differs in any seed, as when both
    arms give one answer to all rows: nothing was seen that could tell how far they may differ.

    Raises:
        ValueError: margin is not positive.
    """
    if not margin > 0:
        raise ValueError(f"margin={margin} must be positive: give the largest difference that does not matter")
    if difference.seeds < FEWEST_SEEDS or difference.error == 0:
        return None
    return _parts_behind(difference).tail(margin - abs(difference.estimate))


def detectable(difference: Difference, power: float = 0.8, alpha: float = 0.05) -> float:
    """Returns the smallest true difference that such a study calls significant with a given probability.

    The parts of the error are taken as the true ones, and the seeds' as no less than the noise it holds. The power
    averages over what a study would estimate for them. No p is given with fewer than 3 seeds; the figure then says when
    the interval would exclude 0.
    """
    parts = _parts_behind(difference, plan=True)
    if parts.variance == 0:
        return 0.0
    high = sqrt(parts.variance)
    while parts.power(high, alpha) < power:
        high *= 2
    return float(optimize.brentq(lambda effect: parts.power(effect, alpha) - power, 0.0, high, rtol=1e-8))


def rows_needed(difference: Difference, effect: float, power: float = 0.8, alpha: float = 0.05) -> int | None:
    """Returns the number of rows with which as many seeds detect an effect, or None where no number would do.

    Rows and noise fall as 1 / rows, what seeds add does not: then only more seeds help. With cluster=True these are the
    rows of more tasks, each with as many rows as now.

    Raises:
        ValueError: effect is not positive.
    """
    if not effect > 0:
        raise ValueError(f"effect={effect} must be positive: give the size of the difference to detect")
    parts = _parts_behind(difference, plan=True)

    def lacks(log_factor: float) -> float:
        k = exp(-log_factor)
        fewer = Parts(
            parts.rows * k,
            max(parts.seeds - parts.noise, 0.0) + parts.noise * k,
            parts.noise * k,
            parts.both * k,
            parts.degrees_rows / k,
            parts.degrees_seeds,
        )
        return fewer.power(effect, alpha) - power

    lowest, highest = log(2 / difference.rows), log(1e9)
    if lacks(lowest) >= 0:
        return 2
    if lacks(highest) < 0:
        return None
    return ceil(difference.rows * exp(optimize.brentq(lacks, lowest, highest, xtol=1e-9)) - 1e-6)


def _parts_behind(difference: Difference, *, plan: bool = False) -> Parts:
    """Returns the variances that a difference was made of; plan: no seeds' part below the noise, which it holds."""
    rows, noise, seeds = (x**2 for x in (difference.error_rows, difference.error_noise, difference.error_seeds or 0.0))
    # Where noise exceeded both, rows is 0 and both is what the error says.
    both = min(rows + noise, difference.error**2)
    seeds = max(seeds, noise) if plan else seeds
    degrees = difference.seeds - 1 if difference.error_seeds is not None else 0
    return Parts(rows, seeds, noise, both, difference.degrees_rows, degrees)


def mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    """Returns McNemar's exact p that two arms of one seed are right on equally many rows: binomial over the discordant.

    Args:
        a: whether the first arm is right, [n].
        b: whether the second is, [n].

    Raises:
        ValueError: the numbers of rows differ.
    """
    a, b = np.asarray(a, bool), np.asarray(b, bool)
    if a.shape != b.shape:
        raise ValueError(f"a has {a.size} rows and b {b.size}: give the same rows of both arms")
    only_a, only_b = int(np.sum(a & ~b)), int(np.sum(b & ~a))
    return float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0


def balanced_accuracy(chosen: NDArray[np.int64], labels: NDArray[np.int64]) -> float:
    """Returns the mean over labels of the share of their rows that is right: 1 / labels for one answer to all rows."""
    chosen, labels = np.asarray(chosen), np.asarray(labels)
    return float(np.mean([np.mean(chosen[labels == label] == label) for label in np.unique(labels)]))


def commonest_share(chosen: NDArray[np.int64]) -> float:
    """Returns the share of the rows that got the commonest answer: near 1, an arm says one thing whatever is asked."""
    return float(np.unique(chosen, return_counts=True)[1].max() / np.size(chosen))
