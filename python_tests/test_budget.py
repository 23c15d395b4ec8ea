"""Budgets: parameters as real modules have them, ranks that fit, and operations as torch counts them."""

import copy
from dataclasses import replace
from typing import get_args

import pytest
import torch
from tiny import llama
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from align_ext import (
    AlignLoraConfig,
    count_parameters,
    flops_per_token,
    match_rank,
    reference,
    replace_linear_with_align_lora,
)
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.architectures import Architecture

ARCHITECTURES = get_args(Architecture)
TASKS = {"num_tasks": 3}


class Two(nn.Module):
    """Two linear layers, from 5 to 7 features and back."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(5, 7), nn.Linear(7, 5, bias=False)

    def forward(self, x):
        return self.down(self.up(x))


def config(architecture, **options):
    return AlignLoraConfig(architecture=architecture, **TASKS, **options)


def trained(model, config):
    model = copy.deepcopy(model)
    replace_linear_with_align_lora(model, config)
    return count_parameters(model)


def test_a_count_by_hand():
    model = Two()
    options = {"target_modules": ("up", "down"), "r": 2}
    # up: A [2, 5], B [7, 2]; down: A [2, 7], B [5, 2]
    count = trained(model, config("lora", **options))
    assert (count.trainable, count.total, count.router) == (48, 48 + 35 + 7 + 35, 0)
    assert count.percent == pytest.approx(100 * 48 / 125)
    assert str(count) == "48 of 125 parameters are trained (38.4%)"
    # hydra, 3 heads: A [2, n], B [3, m, 2], R [3, n]
    count = trained(model, config("hydra", num_heads=3, **options))
    assert (count.trainable, count.router) == (2 * 12 + 3 * 2 * 12 + 3 * 12, 36)
    assert str(count).endswith(", 36 of them in routers")
    assert count_parameters(model).trainable == count_parameters(model).total == 77


def test_a_shared_parameter_counts_once():
    tied = Two()
    tied.down.weight = nn.Parameter(tied.up.weight.T)
    before = count_parameters(tied).total
    tied.again = tied.down
    assert count_parameters(tied).total == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_matched_rank_is_the_largest_that_fits(architecture):
    model, wanted = llama(), config(architecture)
    for rank in (1, 5):
        exact = trained(model, replace(wanted, r=rank)).trainable
        assert match_rank(wanted, model, exact) == rank
        assert match_rank(wanted, model, exact + 1) == rank
        assert match_rank(wanted, model, trained(model, replace(wanted, r=rank + 1)).trainable - 1) == rank


def test_a_lora_of_hydras_size_has_a_larger_rank_and_no_more_parameters():
    model, hydra, lora = llama(), config("hydra", r=4), config("lora")
    rank = match_rank(lora, model, hydra)
    budget = trained(model, hydra).trainable
    assert rank > 4
    assert (
        trained(model, replace(lora, r=rank)).trainable <= budget < trained(model, replace(lora, r=rank + 1)).trainable
    )


def test_a_rank_is_even_for_orthogonal_heads_and_never_above_the_smallest_width():
    model = llama()
    orthogonal = config("lora", init_lora_weights="orthogonal")
    budget = trained(model, config("lora", r=7)).trainable
    assert match_rank(orthogonal, model, budget) == 6
    assert match_rank(config("lora"), model, 10**9) == 48
    assert match_rank(replace(orthogonal, target_modules=("up",)), Two(), 10**9) == 4


def test_ranks_are_matched_on_a_model_that_holds_no_weights():
    with torch.device("meta"):
        empty = llama()
    for architecture in ("lora", "mtlora"):
        wanted = config(architecture)
        assert match_rank(wanted, empty, 40_000) == match_rank(wanted, llama(), 40_000)
        assert all(p.is_meta for p in empty.parameters())
    assert list(map(type, empty.modules())) == list(map(type, llama().modules())), "the model is as it was"


def test_a_budget_that_cannot_be_met_and_an_adapted_model_are_refused():
    with pytest.raises(ValueError, match=r"budget=10 is below .*, what 'hydra' trains at r=1"):
        match_rank(config("hydra"), llama(), 10)
    with pytest.raises(ValueError, match="no layer was adapted"):
        match_rank(config("lora", target_modules=("absent",)), llama(), 10**6)
    model = replace_linear_with_align_lora(llama())
    with pytest.raises(ValueError, match="the model has adapters already"):
        match_rank(config("lora"), model, 10**6)


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def test_the_operations_of_the_base_are_those_that_torch_counts_but_attention():
    model = llama(attn_implementation="eager")
    tokens = torch.zeros(1, 6, dtype=torch.long)
    total = counted(lambda: model(tokens))
    scores = 2 * 2 * 48 * 6 * 6 * 2  # per layer: q kᵀ and softmax v, of 6 tokens in 2 layers
    rotary = total - scores - 6 * flops_per_token(model).base
    assert 0 <= rotary <= 6 * 64, "the angles of the positions are a small product too"
    assert flops_per_token(model).adapters == 0
    assert flops_per_token(replace_linear_with_align_lora(model)).base == flops_per_token(llama()).base


CASES = [
    ("lora", {}),
    ("lora", {"init_lora_weights": "pissa"}),
    ("multi_adapter", {}),
    ("lora_moe", {}),
    ("hydra", {}),
    ("hydra", {"router": None}),
    ("hydra", {"dropout_site": "input_per_head"}),
    ("r_lora", {}),
    ("m_lora", {}),
    ("mtlora", {"target_blocks": (), "routing_groups": 3}),
    ("multilora", {}),
    ("moelora", {}),
    ("mtlora_cvpr", {}),
    ("nlora", {}),
    ("malora", {}),
    ("adalora", {}),
]


@pytest.mark.parametrize(("architecture", "options"), CASES)
def test_the_operations_of_an_adapter_are_those_of_its_plain_form(architecture, options):
    """The oracle's products, as torch counts them: the projections z, the logits, the heads' outputs, the offset."""
    n, m, tokens = 16, 24, 7
    model = nn.Sequential(nn.Linear(n, m))
    wanted = config(architecture, r=4, target_modules=("0",), **options)
    replace_linear_with_align_lora(model, wanted)
    (adapter,) = (layer.adapter for layer in adapted_layers(model).values())
    x, rng = torch.randn(tokens, n), torch.tensor([1, 0])
    A, B = adapter.A.detach(), adapter.lora_B.detach()
    common = {"base_out": torch.zeros(tokens, m), "dropout_p": 0.5, "rng": rng}
    if getattr(adapter, "lora_A0", None) is not None:
        common |= {"A0": adapter.lora_A0, "B0": adapter.lora_B0}
    if wanted.row.by_task and wanted.num_heads is None:  # those that a token goes through
        A, B = A[: wanted.row.paths], B[: wanted.row.paths]

    if wanted.router is None and A.dim() == 3:  # several as one
        A, B = A.flatten(0, 1), B.transpose(0, 1).flatten(1)

    def plain():
        if B.dim() == 2:
            return reference.dropout_sum(x, A, B[None], site="input", **common)
        if wanted.router is None:
            return reference.dropout_sum(x, A, B, site=wanted.dropout_site, **common)
        R = adapter.lora_router.lora_R.detach()
        return reference.routed_lora(x, A, B, R, site=wanted.dropout_site, **common)

    assert counted(plain) == tokens * flops_per_token(model).adapters


def test_a_router_of_sequences_costs_nothing_for_a_token():
    model = nn.Sequential(nn.Linear(16, 24))
    replace_linear_with_align_lora(
        model, config("hydra", r=4, num_heads=5, target_modules=("0",), router="mlp", routing="sequence")
    )
    assert flops_per_token(model).adapters == 2 * (4 * 16 + 5 * 4 * 24)
    assert str(flops_per_token(model)) == "768 FLOPs a token in the base, 1,088 in the adapters (142%)"
