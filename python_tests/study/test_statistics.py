import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from align_ext.report.statistics import (
    Difference,
    balanced_accuracy,
    commonest_share,
    compare,
    detectable,
    equivalence,
    holm,
    interval,
    mcnemar,
    rows_needed,
)

ONE_TASK = np.zeros(2, int)
SMALL = np.array([[1.0, 3], [2, 4], [3, 8]])


def random_difference(seeds, rows, seed=0, /, **spread):
    draw = np.random.default_rng(seed).normal
    parts = {"seeds": (seeds, 1), "rows": (1, rows), "noise": (seeds, rows)}
    return np.zeros((seeds, rows)) + sum(spread.get(name, 0.0) * draw(size=shape) for name, shape in parts.items())


def test_the_parts_by_hand():
    """Means of rows 2, 5: both = 4.5 / 2; of seeds 2, 3, 5.5: 3.25 / 3; residuals +-.5, +-.5, +-1: noise 1.5 / 6."""
    result = compare(SMALL, ONE_TASK)
    assert (result.estimate, result.seeds, result.rows) == (3.5, 3, 2)
    assert result.error_rows**2 == pytest.approx(2.25 - 0.25)
    assert result.error_seeds**2 == pytest.approx(3.25 / 3)
    assert result.error_noise**2 == pytest.approx(0.25)
    assert result.error**2 == pytest.approx(2 + 3.25 / 3)
    # One degree of the rows: the same seeds again would reach further than both parts do.
    assert result.closed_high - 3.5 == pytest.approx(stats.t.ppf(0.975, 1) * 1.5)
    narrow = compare(SMALL, ONE_TASK, level=0.5)
    half = math.sqrt(stats.t.ppf(0.75, 1) ** 2 * 2 + stats.t.ppf(0.75, 2) ** 2 * 3.25 / 3)
    assert narrow.closed_high - 3.5 == pytest.approx(half)
    assert 3.5 - narrow.closed_low == pytest.approx(half)


def test_tasks_weigh_the_same_whatever_their_size():
    d = np.array([[0.0, 2, 10, 10, 10, 14]])
    result = compare(d, np.array([7, 7, 3, 3, 3, 3]))
    assert result.estimate == (1 + 11) / 2
    variances = np.array([2 / 2, 4 / 4]) / 4
    assert result.error**2 == pytest.approx(variances.sum())
    assert result.degrees_rows == pytest.approx(0.5**2 / (variances[0] ** 2 / 1 + variances[1] ** 2 / 3))


def test_clusters_are_means_of_tasks():
    tasks = np.repeat([0, 1, 2], [2, 3, 4])
    d = random_difference(3, 9, rows=1.0, noise=0.5)
    means = np.stack([d[:, tasks == task].mean(1) for task in range(3)], 1)
    ours, theirs = compare(d, tasks, cluster=True), compare(means, np.zeros(3, int))
    assert dataclasses.astuple(dataclasses.replace(ours, rows=3)) == pytest.approx(dataclasses.astuple(theirs))
    assert ours.estimate == pytest.approx(compare(d, tasks).estimate)


def test_where_one_part_rules_p_is_that_of_a_t_test():
    by_seed = np.array([0.3, 1.1, 0.4, 0.9])
    same_rows = compare(np.repeat(by_seed[:, None], 50, 1), np.zeros(50, int))
    assert same_rows.p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue, rel=1e-6)
    by_row = random_difference(1, 50, rows=1.0)[0] + 0.3
    same_seeds = compare(np.tile(by_row, (3, 1)), np.zeros(50, int))
    test = stats.ttest_1samp(by_row, 0)
    assert same_seeds.p == pytest.approx(test.pvalue, rel=1e-6)
    reach = test.confidence_interval(0.95)
    assert (same_seeds.closed_low, same_seeds.closed_high) == pytest.approx((reach.low, reach.high))


def test_few_seeds():
    one = compare(SMALL[:1], ONE_TASK)
    assert (one.p, one.error_seeds, one.error) == (None, None, one.error_rows)
    two = compare(SMALL[:2], ONE_TASK)
    means = compare(SMALL[:2].mean(0, keepdims=True), ONE_TASK)
    assert (two.p, two.error_seeds, two.error) == (None, None, means.error), "it is about these two runs"
    assert equivalence(two, 1.0) is None
    assert interval(SMALL, ONE_TASK) == dataclasses.replace(compare(SMALL, ONE_TASK), p=None)


@pytest.mark.parametrize(("value", "p"), [(0.0, 1.0), (0.25, 0.0)])
def test_without_any_spread(value, p):
    result = compare(np.full((3, 4), value), np.zeros(4, int))
    assert (result.low, result.high, result.p) == (value, value, p)
    assert detectable(result) == 0
    assert equivalence(result, 0.02) is None, "rows that never differ do not show how far they may"
    assert rows_needed(result, 0.1) == 2


@pytest.mark.parametrize(
    "spread", [{"seeds": 1.0}, {"rows": 1.0}, {"noise": 1.0}, {"seeds": 0.05, "rows": 0.5, "noise": 1.0}]
)
@pytest.mark.parametrize("seeds", [1, 12])
def test_the_bootstrap_agrees_with_the_closed_form(spread, seeds):
    d = random_difference(seeds, 600, 3, **spread)
    result = compare(d, np.repeat([0, 1, 2], 200), resamples=4000)
    width = result.closed_high - result.closed_low
    assert result.high - result.low == pytest.approx(width, rel=0.08, abs=1e-12)
    assert result.low == pytest.approx(result.closed_low, abs=0.06 * width + 1e-12)


def test_same_input_same_output():
    d = random_difference(3, 20, rows=1.0, noise=1.0)
    tasks = np.repeat([0, 1], 10)
    assert compare(d, tasks) == compare(d.copy(), tasks)
    assert compare(d, tasks, seed=1).low != compare(d, tasks).low
    assert compare(d, tasks, seed=1).p == compare(d, tasks).p


@given(st.integers(0, 10**6), st.integers(3, 5), st.floats(0.01, 2), st.floats(0.001, 0.2))
def test_p_is_where_the_interval_just_excludes_zero(seed, seeds, scale, alpha):
    d = random_difference(seeds, 12, seed, seeds=scale, rows=1.0, noise=0.5) + 0.7
    result = compare(d, np.repeat([0, 1], 6), level=1 - alpha, resamples=50)
    assert (result.p < alpha) == (result.closed_low > 0 or result.closed_high < 0)
    at_p = compare(d, np.repeat([0, 1], 6), level=1 - result.p, resamples=50)
    assert min(abs(at_p.closed_low), abs(at_p.closed_high)) == pytest.approx(0, abs=1e-6)


@given(st.integers(0, 10**6), st.floats(0.05, 3))
def test_equivalence_is_the_interval_within_the_margin(seed, margin):
    d = random_difference(3, 12, seed, seeds=0.1, rows=0.5, noise=0.5)
    result = compare(d, np.zeros(12, int), level=0.9, resamples=50)
    within = -margin < result.closed_low and result.closed_high < margin
    assert (equivalence(result, margin) < 0.05) == within


@given(st.lists(st.none() | st.floats(0, 1), max_size=8))
def test_holm_adjusts_upwards_in_order(p):
    adjusted = holm(p)
    assert [a is None for a in adjusted] == [x is None for x in p]
    pairs = sorted((x, a) for x, a in zip(p, adjusted, strict=True) if x is not None)
    assert all(x <= a <= 1 for x, a in pairs)
    assert [a for _, a in pairs] == sorted(a for _, a in pairs)


def test_holm_by_hand():
    assert holm([0.03, None, 0.01, 0.02, 0.9]) == pytest.approx([0.06, None, 0.04, 0.06, 0.9])


def test_mcnemar_by_hand():
    """Five discordant rows, four for a: 2 (C(5,4) + C(5,5)) / 2^5."""
    a, b = np.array([1, 1, 1, 1, 0, 1, 0], bool), np.array([0, 0, 0, 0, 1, 1, 0], bool)
    assert mcnemar(a, b) == pytest.approx(2 * 6 / 32)
    assert mcnemar(a, a) == 1.0
    with pytest.raises(ValueError, match="a has 7 rows and b 6"):
        mcnemar(a, b[1:])


def test_one_answer_to_all_has_a_balanced_accuracy_of_chance():
    labels = np.array([0, 0, 0, 1])
    assert balanced_accuracy(np.zeros(4, int), labels) == 0.5
    assert balanced_accuracy(np.array([0, 0, 1, 1]), labels) == pytest.approx((2 / 3 + 1) / 2)
    assert commonest_share(np.array([0, 2, 2, 1])) == 0.5


def test_rows_needed_inverts_detectable():
    result = compare(random_difference(4, 90, seeds=0.02, rows=0.5, noise=0.5), np.repeat([0, 1, 2], 30))
    assert rows_needed(result, detectable(result)) == pytest.approx(90, abs=1)
    assert rows_needed(result, 0.7 * detectable(result)) > 150
    assert rows_needed(result, 1.5 * detectable(result)) < 60
    assert detectable(result, power=0.9) > detectable(result) > detectable(result, alpha=0.2)


def test_no_number_of_rows_makes_up_for_seeds():
    result = compare(random_difference(3, 60, seeds=1.0, rows=0.5, noise=0.5), np.zeros(60, int))
    assert rows_needed(result, 0.5 * detectable(result)) is None


def test_detectable_of_one_part_is_that_of_a_t_test():
    """With 3 seeds, 80% and two sides: noncentral t of 2 degrees; with many rows the sum of two normal quantiles."""
    seeds = Difference(0, 0, 0, 1.0, 0.0, 1.0, 1.0, 0, 0, 3, 100)
    shift, critical = detectable(seeds), stats.t.isf(0.025, 2)
    assert stats.nct.sf(critical, 2, shift) + stats.nct.cdf(-critical, 2, shift) == pytest.approx(0.8, abs=2e-3)
    rows = Difference(0, 0, 0, 1.0, 1.0, None, None, 0, 0, 1, 100)
    assert detectable(rows) == pytest.approx(1.959964 + 0.841621, rel=1e-4)
    assert rows_needed(rows, 1.0) == math.ceil(100 * (1.959964 + 0.841621) ** 2)


@pytest.mark.parametrize(
    ("d", "tasks", "cluster", "message"),
    [
        (np.zeros(3), np.zeros(3, int), False, r"d has the shape \(3,\).*give \[seeds, rows\]"),
        (np.zeros((2, 3)), np.zeros(2, int), False, r"tasks \(2,\)"),
        (np.full((2, 3), np.nan), np.zeros(3, int), False, "d has 6 values that are not finite"),
        (np.zeros((2, 3)), np.array([0, 0, 1]), False, "tasks has a task of one row"),
        (np.zeros((2, 3)), np.zeros(3, int), True, "cluster=True has one task"),
    ],
)
def test_what_cannot_be_compared_is_said(d, tasks, cluster, message):
    with pytest.raises(ValueError, match=message):
        compare(d, tasks, cluster=cluster)


def test_margins_and_effects_are_positive():
    result = compare(SMALL, ONE_TASK)
    with pytest.raises(ValueError, match="margin=0 must be positive"):
        equivalence(result, 0)
    with pytest.raises(ValueError, match="effect=-1 must be positive"):
        rows_needed(result, -1)
