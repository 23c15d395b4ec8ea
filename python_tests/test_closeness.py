"""The tolerance rule: what it lets pass, what it sees, and every operator at small odd sizes."""

from functools import partial

import heads_cases
import pytest
import torch
from closeness import DRAWS, ELEMENTS, assert_draws_are_as_close_as_torch
from heads_cases import results
from hypothesis import given
from hypothesis import strategies as st
from ops import test_gaussian_kl, test_grouped_lora, test_mk_mmd, test_routed_lora

from align_ext import reference

# ---- The rule


def rounded(seed, size, ours, torchs=4):
    """Numbers with errors of so many roundings of float32, others with those of plain PyTorch, and exact ones."""
    g = torch.Generator().manual_seed(seed)
    exact, *errors = (torch.randn(size, generator=g, dtype=torch.float64) for _ in range(3))
    eps = torch.finfo(torch.float32).eps
    near = ((exact + eps * of * error).float() for of, error in zip((ours, torchs), errors, strict=True))
    return *({"y": tensor} for tensor in near), {"y": exact}


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_errors_like_torchs_pass_and_four_times_as_large_ones_fall_whatever_the_draw(size):
    for first in range(0, 200 * DRAWS, DRAWS):
        assert_draws_are_as_close_as_torch(lambda seed, first=first: rounded(first + seed, size, 4))
        with pytest.raises(AssertionError, match=r"y, .* draws: error"):
            assert_draws_are_as_close_as_torch(lambda seed, first=first: rounded(first + seed, size, 20))


@pytest.mark.parametrize("size", [1, 7])
def test_an_error_in_one_draw_of_all_is_seen(size):
    def draw(seed):
        actual, same, exact = rounded(seed, size, 4)
        return {"y": actual["y"] * (1.001 if seed == DRAWS - 1 else 1)}, same, exact

    with pytest.raises(AssertionError, match="draws: error"):
        assert_draws_are_as_close_as_torch(lambda seed: draw(seed + (0 if size == 1 else DRAWS - 1)))


def test_an_output_of_few_elements_is_judged_over_more_draws():
    drawn = []

    def draw(seed):
        drawn.append(seed)
        empty = {"none": torch.zeros(0)}, {"none": torch.zeros(0)}, {"none": torch.zeros(0, dtype=torch.float64)}
        return tuple(a | b for a, b in zip(rounded(seed, size, 4), empty, strict=True))

    for size, draws in ((1, DRAWS), (2, DRAWS), (ELEMENTS // 4, 4), (ELEMENTS, 1)):
        drawn.clear()
        assert_draws_are_as_close_as_torch(draw)
        assert drawn == list(range(draws)), size


def test_draws_whose_output_is_exactly_zero_count_for_nothing():
    drawn = []

    def draw(seed):
        drawn.append(seed)
        return tuple({"y": results["y"] * (seed < 1 or seed % 4 == 3)} for results in rounded(seed, ELEMENTS // 2, 4))

    assert_draws_are_as_close_as_torch(draw)
    assert drawn == [0, 1, 2, 3]


# ---- What it sees: a reference that leaves something out, in the place of a kernel

DROPPED = {
    "the last head": lambda inputs: inputs | {"B": torch.cat([inputs["B"][:-1], torch.zeros_like(inputs["B"][-1:])])},
    "the masks": lambda inputs: inputs,
    "the last row of dy": lambda inputs: inputs | {"dy": torch.cat([inputs["dy"][:-1], 0 * inputs["dy"][-1:]])},
    "the last row of x": lambda inputs: inputs | {"x": torch.cat([inputs["x"][:-1], 0 * inputs["x"][-1:]])},
    "the last column of x": lambda inputs: inputs | {"x": torch.cat([inputs["x"][:, :-1], 0 * inputs["x"][:, -1:]], 1)},
    "a split of A's columns": lambda inputs: inputs | {"A": inputs["A"] * (torch.arange(inputs["A"].shape[-1]) > 7)},
}


@pytest.mark.parametrize("dtype", heads_cases.DTYPES)
@pytest.mark.parametrize("shape", [(64, 128, 96, 8, 3), (65, 67, 45, 5, 4), (33, 31, 129, 17, 2)])
@pytest.mark.parametrize("architecture", ["latent masks", "own A, masks on x per head"])
@pytest.mark.parametrize("what", DROPPED)
def test_whatever_is_left_out_is_seen(what, shape, architecture, dtype):
    inputs, options = test_routed_lora.cases(architecture, shape, dtype)
    without = options | ({"dropout_p": 0.0} if what == "the masks" else {})

    def draw(seed):
        drawn = inputs(seed=seed)
        double = {name: t.double() for name, t in drawn.items()}
        wrong = results(reference.routed_lora, DROPPED[what](double), **without)
        same, exact = (results(reference.routed_lora, of, **options) for of in (drawn, double))
        return {name: t.to(same[name].dtype) for name, t in wrong.items()}, same, exact

    with pytest.raises(AssertionError, match="draws: error"):
        assert_draws_are_as_close_as_torch(draw)


# ---- Every operator at small odd sizes


def head_case(draw, device, dtype):
    op = draw(st.sampled_from(["dropout_sum", "routed_lora"]))
    heads, groups = draw(st.integers(1, 5)), draw(st.integers(1, 4)) if op == "routed_lora" else 0
    shape = (draw(TOKENS), draw(SIZE), draw(SIZE) * (groups or 1), draw(RANK), heads)
    A_per_head = op == "routed_lora" and draw(st.booleans())
    site = draw(st.sampled_from(["none", "input", "latent", "input_per_head"]))
    options = {"site": site, "dropout_p": 0.0 if site == "none" else draw(st.sampled_from([0.0, 0.3]))}
    if op == "routed_lora":
        options |= {"top_k": draw(st.integers(1, heads)), "tau": draw(st.sampled_from([0.5, 1.0, 2.0]))}
    sizes = {"groups": groups, "A_per_head": A_per_head, "offset_rank": draw(st.integers(0, 3))}
    inputs = from_seed(draw, partial(heads_cases.make, shape, dtype, site=site, **sizes))
    heads_cases.compare(op, device, inputs, weight_form=draw(st.booleans()), **options)


def grouped_case(draw, device, dtype):
    groups = draw(st.integers(1, 3))
    sizes = draw(TOKENS), draw(SIZE), draw(SIZE), draw(RANK), groups
    options = {"weight_form": draw(st.booleans()), "p": draw(st.sampled_from([0.0, 0.3]))}
    options |= {"kind": draw(st.sampled_from(["group", "offsets"])), "groups": groups}
    inputs = from_seed(draw, partial(test_grouped_lora.make, *sizes, dtype))
    test_grouped_lora.compare(device, inputs, **options)


def loss_case(module, options):
    def case(draw, device, dtype):
        tasks = draw(st.integers(2, 5))
        inputs = from_seed(draw, partial(module.make, draw(st.integers(12, 90)), draw(RANK), tasks, dtype))
        module.compare(device, inputs, tasks, **{name: draw(st.sampled_from(of)) for name, of in options.items()})

    return case


def from_seed(draw, inputs):
    """Inputs whose seeds begin anywhere."""
    first = draw(st.integers(0, 2**30))
    return lambda seed: inputs(seed=first + seed)


TOKENS, SIZE, RANK = st.integers(1, 70), st.integers(1, 40), st.integers(1, 20)
KL = {"pairs": ["sum", "mean"], "ddof": [0, 1], "eps": [1e-1, 1e-2]}  # a gradient that float16 holds
MMD = {
    "pairs": ["sum", "mean"],
    "statistic": ["v", "u"],
    "bandwidths": ["heuristic", [4.0], [1.0, 2.0, 4.0, 8.0, 16.0, 32.0], [30.0, 1.0, 7.0]],
    "n_max": [5, 33, 256],
}
CASES = {
    "heads": head_case,
    "grouped_lora": grouped_case,
    "gaussian_kl": loss_case(test_gaussian_kl, KL),
    "mk_mmd": loss_case(test_mk_mmd, MMD),
}


@given(draw=st.data(), case=st.sampled_from(sorted(CASES)), dtype=st.sampled_from(heads_cases.DTYPES))
def test_fuzzed_small_sizes_meet_the_rule(draw, case, dtype):
    CASES[case](draw.draw, torch.device("cpu"), dtype)
