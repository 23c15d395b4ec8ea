"""Activation checkpointing of all layers or of every second, of either kind, changes no gradient."""

import functools
import itertools

import pytest
from test_batch import CHECKPOINTING, EXACT, by_keyword, single, two_pending_reversed, two_pending_summed
from tiny import Oracle, adapted, error, gpt2, gradients, llama, qwen2

MODELS = {
    "llama": (llama, {}),
    "llama, DoRA": (llama, {"use_dora": True}),
    "qwen2": (qwen2, {}),
    "gpt2": (gpt2, {"target_modules": ["c_fc", "c_proj"]}),
}
FLOWS = {single: (1,), two_pending_summed: (1, 2), two_pending_reversed: (1, 2)}


def model_of(name):
    make, options = MODELS[name]
    return adapted(make(), lora_dropout=0.2, **options)


@functools.cache
def expected(name, *weights):
    return Oracle(model_of(name)).gradients(list(weights))


@pytest.mark.parametrize(("mode", "every"), [(None, 1), *itertools.product(CHECKPOINTING[1:], (1, 2))])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_the_equations(name, mode, every):
    model = model_of(name)
    if mode is not None:
        model.activation_checkpointing_enable({"use_reentrant": mode == "reentrant"}, every_n_layers=every)
    for flow, weights in FLOWS.items():
        model.zero_grad()
        flow(functools.partial(by_keyword, model))
        assert error(gradients(model), expected(name, *weights)) < EXACT, flow.__name__
