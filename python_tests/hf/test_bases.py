"""Every architecture on every kind of frozen base: dtypes, experts, packed weights; training, export, merging."""

import pytest
import torch
from architectures import FROM_WEIGHT, ON_LAYERS, config_of
from hf.test_replace import PackedLinear
from tiny import VOCAB, batch, llama
from torch import nn

from align_ext import (
    adapter_report,
    align_parts,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
)


def train(model, steps=2):
    """The losses of some steps of AdamW, the frozen parameters as they were."""
    inputs, tasks = batch()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(**inputs, task_ids=tasks).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unchanged = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(frozen, unchanged, strict=True))
    return losses


def packed():
    """A tiny Llama of which every linear layer of the MLPs is quantised."""
    model = llama()
    for layer in model.model.layers:
        for name, linear in list(layer.mlp.named_children()):
            if isinstance(linear, nn.Linear):
                setattr(layer.mlp, name, PackedLinear(linear))
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("architecture", ["align_lora", "lora_moe, top 2", "r_lora", "mtlora, blocks"])
def test_a_base_of_any_float_dtype_trains(architecture, dtype):
    model = replace_linear_with_align_lora(llama().to(dtype), config_of(architecture, r=4, align="kl"))
    losses = train(model, steps=6)
    assert losses[-1] < losses[0] - 0.05
    assert align_parts(model).align > 0
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)
    assert all(p.grad.any() for p in trained)


def test_a_mixture_of_experts_trains_beside_its_attention():
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, vocab_size=VOCAB))
    replace_linear_with_align_lora(model, target_modules=["q_proj", "v_proj"], r=4, num_tasks=3)
    report = adapter_report(model)
    assert report.replaced == [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"]
    assert any("tensors of experts" in line for line in report.unmatched)
    losses = train(model)
    assert losses[1] < losses[0]
    assert align_parts(model).align > 0


@pytest.mark.parametrize("architecture", [n for n in ON_LAYERS if n not in FROM_WEIGHT and "DoRA" not in n])
def test_every_architecture_trains_on_packed_weights_and_is_saved(architecture, tmp_path):
    config = config_of(architecture, r=4)
    model = replace_linear_with_align_lora(packed(), config)
    losses = train(model, steps=6)
    assert losses[-1] < losses[0] - 0.05
    save_adapter(model, tmp_path)
    loaded = load_adapter(packed(), tmp_path)
    inputs, tasks = batch()
    of_task = {"task_ids": tasks} if config.row.by_task else {}
    assert torch.equal(loaded.eval()(**inputs, **of_task).logits, model.eval()(**inputs, **of_task).logits)


@pytest.mark.parametrize("architecture", ["lora", "hydra without router", "m_lora, sum"])
def test_merging_into_packed_weights_is_refused_with_the_reason(architecture):
    model = replace_linear_with_align_lora(packed(), config_of(architecture, r=4))
    with pytest.raises(ValueError, match="quantised: load the base in a floating-point dtype to merge"):
        merge_and_unload(model)


def test_dora_is_refused_where_nothing_tells_the_weight():
    model = packed()
    before = {name: type(module) for name, module in model.named_modules()}
    with pytest.raises(ValueError, match=r"gate_proj: use_dora: PackedLinear does not tell the values .*"):
        replace_linear_with_align_lora(model, config_of("lora, DoRA", r=4))
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_a_start_from_the_weight_is_refused_where_it_is_packed():
    with pytest.raises(ValueError, match='"pissa" needs the base weight in memory and in a floating-point dtype'):
        replace_linear_with_align_lora(packed(), config_of("lora, pissa", r=4))
