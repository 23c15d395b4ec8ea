import math

import numpy as np
import pytest

from align_ext.report.metrics import answer_loss, choice_nll, choose, commonest_accuracy, right, values


def row(nll, tokens, label=0, also=(), greedy=None):
    common = {"id": "t/1", "task": "t", "split": "test"}
    return {**common, "label": label, "also": list(also), "nll": nll, "tokens": tokens, "greedy": greedy}


# Sums 2, 3; per token 2, 1: the normalisations choose differently.
LONG = row([2.0, 3.0], [1, 3], label=1)


def test_each_normalisation_chooses_its_own():
    assert choose(LONG) == (0, False)
    assert choose(LONG, per_token=True) == (1, False)
    assert (right(LONG), right(LONG, per_token=True)) == (0.0, 1.0)


def test_a_tie_is_said_and_the_first_is_taken():
    assert choose(row([1.5, 1.0, 1.0], [1, 1, 1])) == (1, True)
    assert choose(row([1.0, 1.5, 1.5], [1, 1, 1])) == (0, False)  # a tie of others is none
    assert choose(row([1.0, 2.0], [1, 2]), per_token=True) == (0, True)


def test_other_right_choices_count():
    two = row([2.0, 1.0, 3.0], [1, 1, 1], label=0, also=[1])
    assert right(two) == 1.0
    assert right({**two, "also": []}) == 0.0


def test_choice_nll_by_hand():
    assert choice_nll(LONG) == pytest.approx(math.log(1 + math.e))  # e^-3 / (e^-2 + e^-3)
    assert choice_nll(LONG, per_token=True) == pytest.approx(math.log(1 + math.exp(-1)))
    two = row([1.0, 2.0, 3.0], [1, 1, 1], label=0, also=[2])
    expected = -math.log((math.exp(-1) + math.exp(-3)) / (math.exp(-1) + math.exp(-2) + math.exp(-3)))
    assert choice_nll(two) == pytest.approx(expected)
    assert choice_nll({**two, "also": [2, 0]}) == choice_nll(two)  # a label said twice counts once


def test_choice_nll_of_long_answers_is_finite():
    assert choice_nll(row([9000.0, 9001.0], [900, 900])) == pytest.approx(math.log1p(math.exp(-1)))
    assert choice_nll(row([9001.0, 1.0], [900, 900])) == pytest.approx(9000)
    assert choice_nll(row([1.0, 9001.0], [900, 900])) == 0


def test_free_text():
    text = row([6.0], [4], label=-1, greedy=0.5)
    assert right(text) == 0.5
    assert answer_loss(text) == 1.5
    assert math.isnan(choice_nll(text))
    assert math.isnan(right({**text, "greedy": None}))
    assert math.isnan(commonest_accuracy([text]))


def test_answer_loss_is_of_the_gold_answer():
    assert answer_loss(LONG) == 1.0


def test_values_are_in_the_order_of_the_rows():
    rows = [LONG, row([1.0, 2.0], [1, 1])]
    np.testing.assert_array_equal(values(rows, right), [0, 1])
    np.testing.assert_array_equal(values(rows, right, per_token=True), [1, 1])
    np.testing.assert_array_equal(values(rows, answer_loss), [1, 1])


def test_the_commonest_answer():
    rows = [row([1.0, 1.0, 1.0], [1, 1, 1], label=label) for label in (0, 1, 1, 2)]
    assert commonest_accuracy(rows) == 0.5
    rows[3]["also"] = [1]
    assert commonest_accuracy(rows) == 0.75
