"""Layers with heads, routers and offsets that a module calls with the same tensor: one operator, the same numbers."""

import pytest
from architectures import ARCHITECTURES, config_of
from test_batch import CHECKPOINTING, EXACT, FLOWS, by_keyword, checkpointed
from test_siblings import EVERY, JOINED, calls, groups_of, kept
from tiny import Oracle, adapted, error, gradients

# Masks on latents, one mask on x, routers, an A for each head, weights for groups of outputs, offsets, DoRA.
NAMES = [
    "m_lora, mean", "r_lora", "hydra", "hydra, random heads", "lora_moe, top 2", "mtlora, two groups", "m_lora, DoRA",
    "lora, pissa",
]  # fmt: skip
ALONE = ["hydra, gaussian", "hydra without router", "mtlora, by sequence", "malora"]


def options_of(name, **options):
    config = config_of(name, lora_dropout=0.3)
    heads = {} if config.num_heads is None else {"num_heads": config.num_heads}
    return ARCHITECTURES[name] | heads | EVERY | options


@pytest.mark.parametrize(("name", "groups"), [(n, JOINED) for n in NAMES] + [(n, []) for n in ALONE])
def test_layers_are_joined_where_one_operator_computes_all(name, groups):
    assert groups_of(adapted(**options_of(name, lora_dropout=0.3))) == groups


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_exact_with_and_without(name):
    for dropout in (0.0, 0.3):
        for share in (True, False):
            options = options_of(name, lora_dropout=dropout, share_inputs=share)
            model, oracle = adapted(**options), Oracle(adapted(**options))
            expected = oracle.gradients([1])
            by_keyword(model, 0)().backward()
            assert error(gradients(model), expected) < EXACT, (dropout, share)


@pytest.mark.parametrize("mode", [mode for mode in CHECKPOINTING if mode is not None])
@pytest.mark.parametrize("name", ["m_lora, mean", "r_lora"])
def test_every_mode_is_exact(name, mode):
    options = options_of(name, lora_dropout=0.0)
    expected = {weights: Oracle(adapted(**options)).gradients(list(weights)) for weights in {*FLOWS.values()}}
    model = checkpointed(adapted(**options), mode)
    for flow, weights in FLOWS.items():
        model.zero_grad()
        flow(lambda seed: by_keyword(model, seed))
        assert error(gradients(model), expected[weights]) < EXACT, flow.__name__


@pytest.mark.parametrize(("name", "alone"), [("m_lora, mean", "dropout_sum"), ("r_lora", "routed_lora")])
def test_a_layer_of_the_model_takes_four_operators_in_place_of_seven_and_keeps_no_more(name, alone):
    options = options_of(name, lora_dropout=0.1)
    together, each = calls(adapted(**options)), calls(adapted(share_inputs=False, **options))
    assert together == {"sibling_lora": 4, "sibling_lora_backward": 4, alone: 4, f"{alone}_backward": 4}
    assert each == {alone: 14, f"{alone}_backward": 14}
    assert kept(**options) <= kept(share_inputs=False, **options)


def test_a_layer_with_another_rank_or_a_frozen_router_has_its_own_gradients():
    options = options_of("r_lora", lora_dropout=0.0, rank_pattern={"k_proj": 2, "up_proj": 6})
    found = []
    for share in (True, False):
        model = adapted(share_inputs=share, **options)
        model.model.layers[0].self_attn.v_proj.adapter.lora_router.requires_grad_(False)
        by_keyword(model, 0)().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert error(found[0], found[1]) < EXACT
