"""Adapters beside whole blocks: which are found, what they keep of the block, and what is refused."""

import pytest
import torch
from tiny import batch, gpt2, llama, qwen2
from torch import nn

from align_ext import adapter_report, replace_linear_with_align_lora
from align_ext.adapters.adapted_block import AdaptedBlock

OPTIONS = {"architecture": "mtlora", "num_heads": 3, "r": 4, "target_blocks": ("attention", "mlp")}


@pytest.mark.parametrize(("make", "names"), [(llama, "self_attn mlp"), (qwen2, "self_attn mlp"), (gpt2, "attn mlp")])
def test_every_attention_and_mlp_block_is_adapted_and_starts_as_no_change(make, names):
    model, (inputs, _) = make().eval(), batch()
    before = model(**inputs).logits
    replace_linear_with_align_lora(model, **OPTIONS)
    found = {name.rpartition(".")[2] for name in adapter_report(model).replaced}
    assert found == set(names.split())
    assert len(adapter_report(model).replaced) == 4
    assert torch.equal(model(**inputs).logits, before)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained
    assert all("adapter.lora_" in name for name in trained)


def test_one_kind_of_block_and_excluded_ones_are_left_alone():
    model = replace_linear_with_align_lora(llama(), **OPTIONS | {"target_blocks": ["mlp"]})
    assert adapter_report(model).replaced == ["model.layers.0.mlp", "model.layers.1.mlp"]
    model = replace_linear_with_align_lora(llama(), **OPTIONS, exclude_modules=r"model\.layers\.0\..*")
    assert adapter_report(model).replaced == ["model.layers.1.self_attn", "model.layers.1.mlp"]
    with pytest.raises(ValueError, match="excludes all of them"):
        replace_linear_with_align_lora(llama(), **OPTIONS, exclude_modules=["self_attn", "mlp"])


def test_a_block_looks_from_outside_as_it_did():
    model = replace_linear_with_align_lora(llama(), **OPTIONS)
    attention = model.model.layers[1].self_attn
    assert isinstance(attention, AdaptedBlock)
    assert attention.layer_idx == 1
    assert "has no one weight" in attention.unmergeable_reason()
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = attention.nothing_like_it


def test_the_checkpoint_of_the_plain_model_still_loads():
    model, other = replace_linear_with_align_lora(llama(), **OPTIONS), llama()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    result = model.load_state_dict(other.state_dict(), strict=False)
    assert result.unexpected_keys == []
    assert all("adapter.lora_" in key for key in result.missing_keys)
    inputs, _ = batch()
    assert torch.equal(model.eval()(**inputs).logits, other.eval()(**inputs).logits)
    own = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.load_state_dict(own)
    assert all(torch.equal(own[key], tensor) for key, tensor in model.state_dict().items())


def test_models_without_such_blocks_and_peft_models_are_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(ValueError, match="found no layers of one attention and one MLP block"):
        replace_linear_with_align_lora(nn.Sequential(nn.Linear(8, 8)), **OPTIONS)
    peft = get_peft_model(llama(), LoraConfig(target_modules=["up_proj"]))
    with pytest.raises(ValueError, match="adopted as lora or align_lora"):
        replace_linear_with_align_lora(peft, target_blocks=["mlp"])
