"""The comparisons of a study: each arm with the baseline and with its controls, and what may be said of them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from align_ext.report import statistics
from align_ext.report.chosen import Arms, Array, Variant
from align_ext.report.statistics import Difference

LEVEL = 0.05  # what Holm's p must be below for a difference to be called one
LOWER_IS_BETTER = frozenset({"choice_nll", "choice_nll_sum", "loss"})
POINT = 0.01  # of accuracy
FEW_RESAMPLES = 20  # where only the closed form is read


@dataclass(frozen=True)
class Comparison:
    """A variant minus another on the rows of a split.

    Attributes:
        variant: the one.
        other: what is subtracted.
        measure: of what; see chosen.Scores.
        difference: estimate, interval and their parts.
        holm: the p-value adjusted for all comparisons of its table; None with fewer than 3 seeds.
        equivalent: the p-value of "differs by less than the margin", accuracy alone.
        detectable: the smallest difference that would have been seen with a power of 80%.
        rows_needed: how many rows would show 1 point, accuracy alone; None where no number of rows would.
        mcnemar: the exact p-value of each seed by itself, accuracy alone.
    """

    variant: Variant
    other: Variant
    measure: str
    difference: Difference
    holm: float | None
    equivalent: float | None
    detectable: float | None
    rows_needed: float | None
    mcnemar: tuple[float, ...]

    @property
    def separable(self) -> bool:
        """Whether it is called a difference: Holm's p below 0.05; with fewer than 3 seeds both intervals without 0."""
        if self.holm is not None:
            return self.holm < LEVEL
        of = self.difference
        return min(of.low, of.closed_low) > 0 or max(of.high, of.closed_high) < 0

    @property
    def better(self) -> bool:
        """Whether the variant is separable from the other, and better."""
        return self.separable and (self.difference.estimate < 0) == (self.measure in LOWER_IS_BETTER)

    @property
    def worse(self) -> bool:
        """Whether the variant is separable from the other, and worse."""
        return self.separable and not self.better


def headline_of(found: Mapping[str, list[Comparison]]) -> str | None:
    """Returns the measure that a study speaks of first: the likelihood of choices or of free text, of more rows."""
    likelihoods = [measure for measure in ("choice_nll", "loss") if found.get(measure)]
    if likelihoods:
        return max(likelihoods, key=lambda measure: max(one.difference.rows for one in found[measure]))
    return next((measure for measure in ("accuracy", "exact") if found.get(measure)), None)


def with_baseline(arms: Arms, split: str, measure: str) -> list[Comparison]:
    """Compares every variant with the baseline; p-values are adjusted by Holm over all of them.

    Args:
        arms: the study's arms.
        split: "test", or "unseen", whose tasks are a sample of tasks: the interval is clustered by task.
        measure: see chosen.Scores.
    """
    pairs = [(variant, arms.baseline(variant)) for variant in arms.trained]
    return _compare_all(arms, [(one, other) for one, other in pairs if other is not None], split, measure)


def with_controls(arms: Arms, variant: Variant, split: str, measure: str) -> list[Comparison]:
    """Compares an aligned variant with each of its controls.

    To be better than every control takes no adjustment of p: the largest p of all decides (an intersection-union test).
    """
    pairs = [(variant, control) for control in controls(arms, variant)]
    return [one for pair in pairs for one in _compare_all(arms, [pair], split, measure)]


def controls(arms: Arms, variant: Variant) -> list[Variant]:
    """Returns the finished controls of an aligned variant.

    A control of it has its architecture, and its loss where there are such; controls without alignment (weight 0, L2)
    are controls of every loss.
    """
    found = [arms.counterpart(variant, name) for name in _controls(arms, variant)]
    return [one for one in found if one is not None]


def missing_controls(arms: Arms, variant: Variant) -> list[str]:
    """Returns the names of the controls of a variant that are planned and not finished."""
    return [name for name in _controls(arms, variant) if arms.counterpart(variant, name) is None]


def without_alignment(arms: Arms, variant: Variant) -> list[Variant]:
    """Returns the variants of an aligned one's architecture and rank that nothing aligns, but for the baseline."""
    about = arms.results.arms[variant.arm]
    kin = [
        name
        for name, arm in arms.results.arms.items()
        if name != arms.results.baseline and not arm["align"] and not arm["control"]
        and (arm["architecture"], arm["rank"]) == (about["architecture"], about["rank"])
    ]  # fmt: skip
    found = [arms.counterpart(variant, name) for name in kin]
    return [one for one in found if one is not None]


def _controls(arms: Arms, variant: Variant) -> list[str]:
    about = arms.results.arms[variant.arm]
    kin = {
        name: arm
        for name, arm in arms.results.arms.items()
        if arm["control"] and arm["architecture"] == about["architecture"]
    }
    of_every_loss = ("weight_zero", "l2")
    of_loss = [name for name, arm in kin.items() if arm["align"] == about["align"] or arm["control"] in of_every_loss]
    return of_loss or list(kin)


def is_aligned(arms: Arms, variant: Variant) -> bool:
    """Whether a variant is trained with an alignment loss and is no control; a weight of 0 aligns nothing."""
    about = arms.results.arms.get(variant.arm)
    weight = dict(variant.point).get("align_weight", about and about["align_weight"])
    return bool(about and about["align"] and not about["control"] and weight != 0)


def is_control(arms: Arms, variant: Variant) -> bool:
    """Whether a variant is a control."""
    return bool(arms.results.arms.get(variant.arm, {}).get("control"))


def _compare_all(arms: Arms, pairs: list[tuple[Variant, Variant]], split: str, measure: str) -> list[Comparison]:
    found = []
    for variant, other in pairs:
        d, tasks = arms.differences(variant, other, split, measure)
        if d.size and d.shape[1] > 1:
            cluster = split == "unseen" and len(np.unique(tasks)) > 1
            found.append((variant, other, statistics.compare(d, tasks, cluster=cluster)))
    adjusted = statistics.holm([difference.p for _, _, difference in found])
    return [
        _comparison(arms, variant, other, split, measure, difference, p)
        for (variant, other, difference), p in zip(found, adjusted, strict=True)
    ]


def _comparison(
    arms: Arms, variant: Variant, other: Variant, split: str, measure: str, difference: Difference, holm: float | None
) -> Comparison:
    points = measure in ("accuracy", "exact")
    return Comparison(
        variant,
        other,
        measure,
        difference,
        holm,
        statistics.equivalence(difference, arms.results.plan["margin"]) if points else None,
        statistics.detectable(difference) if difference.error > 0 else None,
        statistics.rows_needed(difference, POINT) if points and difference.error > 0 else None,
        _mcnemar(arms, variant, other, split) if measure == "accuracy" else (),
    )


def _mcnemar(arms: Arms, variant: Variant, other: Variant, split: str) -> tuple[float, ...]:
    d, _ = arms.differences(variant, other, split, "accuracy")
    return tuple(statistics.mcnemar(of_seed > 0, of_seed < 0) for of_seed in d)  # what both have does not count


def at_chance(right: Array, labels: int) -> bool:
    """Whether a balanced accuracy is not separable from that of one answer to all rows.

    Args:
        right: [S, n] weights of right rows, whose mean is the balanced accuracy.
        labels: how many labels there are.
    """
    found = statistics.interval(right, np.zeros(right.shape[1], int), resamples=FEW_RESAMPLES)
    return bool(found.closed_low <= 1.0 / labels)
