"""What rounding explains: seen from the model, and enough for a merged model of any depth, but for no other one."""

import pytest
import torch
from hf.words import llama, tokenizer
from torch import nn

from align_ext import merge_and_unload, replace_linear_with_align_lora
from align_ext.evaluation.same_logits import relative_difference, rounding_difference

IDS = torch.arange(4, 60)[None] % (len(tokenizer()) - 4) + 4


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_by_hand(dtype):
    """One weight 1, whose last bit makes it a unit larger or not, and an input 1."""
    layer = nn.Linear(1, 4000, bias=False).to(dtype).requires_grad_(False)
    layer.weight.fill_(1)
    unit = torch.finfo(dtype).eps

    def logits():
        return layer(torch.ones(1, 1, dtype=dtype)).float()

    found = rounding_difference(logits, logits(), [layer.weight])
    assert found == 2 * unit
    assert bool((layer.weight == 1).all()), "put back"


def test_in_float32_and_where_no_weights_are_at_hand_it_is_a_number():
    some = torch.ones(3)
    assert rounding_difference(lambda: 1 / 0, some, [some]) == 1e-4
    assert rounding_difference(lambda: 1 / 0, some, []) == 0.05
    assert rounding_difference(lambda: 1 / 0, some, [some.int()]) == 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layers", [2, 12])
def test_it_explains_merging_but_no_other_adapter(dtype, layers):
    model = llama(dtype, num_hidden_layers=layers)
    replace_linear_with_align_lora(model, num_tasks=1, target_modules="all-linear", align=None)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "adapter.B" in name:
            nn.init.normal_(parameter, std=0.02)
    weights = [p for name, p in model.named_parameters() if ".base_layer." in name]
    trained = logits_of(model.eval())
    limit = rounding_difference(lambda: logits_of(model), trained, weights)
    assert 1e-4 < limit < 0.2
    assert relative_difference(logits_of(merge_and_unload(model)), trained) <= limit
    for weight in weights:
        weight.data += 0.02 * torch.randn_like(weight)
    assert relative_difference(logits_of(model), trained) > limit
