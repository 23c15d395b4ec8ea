"""Options drawn at random together: whatever is taken trains, is saved, loaded, read by PEFT, merged and taken off."""

import copy
import random

import pytest
import torch
from hf.mixtures import eager
from peft import PeftModel
from tiny import batch, gpt2, llama, qwen2

from align_ext import (
    disable_adapter,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    set_adapter,
    set_task,
    unload,
)
from align_ext.adapters.adapted_block import adapted_layers


def tied():
    return llama(tie_word_embeddings=True)


def mixtral():
    return eager("Mixtral")


NAMES = {  # base: two layers, the embedding, a norm
    llama: ("q_proj", "v_proj", "embed_tokens", "norm"),
    tied: ("q_proj", "v_proj", "embed_tokens", "norm"),
    qwen2: ("q_proj", "down_proj", "embed_tokens", "norm"),
    gpt2: ("c_fc", "c_attn", "wte", "ln_f"),
    mixtral: ("q_proj", "v_proj", "embed_tokens", "norm"),
}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def draw(pick):
    """A base, and options of which many are refused together."""
    base = pick.choice(list(NAMES))
    first, second, embedding, norm = NAMES[base]
    targets = ("all-linear", [first, second], [first, "lm_head"], [second, embedding], [first, "lm_head", embedding])
    choices = {
        "target_modules": (0.6, targets), "use_dora": (0.4, (True,)), "lora_bias": (0.2, (True,)),
        "bias": (0.4, ("all", "lora_only")), "use_rslora": (0.3, (True,)), "rank_pattern": (0.2, ({first: 3},)),
        "trainable_token_indices": (0.35, ([1, 3], {embedding: [2, 5]})), "alpha_pattern": (0.2, ({first: 7.0},)),
        "modules_to_save": (0.25, ([norm], ["lm_head"])), "layers_to_transform": (0.2, ([1],)),
        "init_lora_weights": (0.2, ("gaussian", "orthogonal", "pissa")),
        "target_parameters": (0.7 * (base is mixtral), (EXPERTS, EXPERTS[1:])),
    }  # fmt: skip
    options = {name: pick.choice(values) for name, (share, values) in choices.items() if pick.random() < share}
    architecture = pick.choice(["lora", "lora", "align_lora", "m_lora", "hydra", "multi_adapter"])
    return base, options | {"architecture": architecture, "r": pick.choice([1, 2, 4]), "num_tasks": 3}


def logits(model):
    with torch.no_grad():
        return model(input_ids=batch()[0]["input_ids"]).logits


def adapted(base, options, seed):
    """The model with its trained values off their start, task 1 named where there is one for each; None: refused."""
    model, generator = copy.deepcopy(base), torch.Generator().manual_seed(seed)
    try:
        replace_linear_with_align_lora(model, **options)
    except ValueError:
        return None
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return named(model)


def named(model):
    if model.align_state.config.row.by_task:
        set_task(model, 1)
    return model.eval()


@pytest.mark.parametrize("seed", range(24))
def test_options_that_are_taken_together_hold_together(seed, tmp_path):
    pick, model = random.Random(seed), None
    while model is None:  # the options were refused together
        kind, options = draw(pick)
        base = kind().double().eval()
        model = adapted(base, options, seed)
    before = logits(base)
    expected, (inputs, ids) = logits(model), batch()
    ids = {"task_ids": ids} if model.align_state.config.needs_ids else {}
    model.train()(**inputs, **ids).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad == (p.grad is None)] == []
    model.zero_grad(set_to_none=True)
    with disable_adapter(model.eval()):
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(named(load_adapter(copy.deepcopy(base), tmp_path / "adapter"))), expected)
    several = replace_linear_with_align_lora(copy.deepcopy(base), architecture="lora", r=2)
    load_adapter(several, tmp_path / "adapter", "second")
    set_adapter(several, "second")
    assert torch.equal(logits(named(several)), expected)
    for folder in (tmp_path / "adapter", tmp_path / "adapter/tasks/1"):
        if (folder / "adapter_config.json").exists():
            theirs = PeftModel.from_pretrained(copy.deepcopy(base), str(folder)).eval()
            torch.testing.assert_close(logits(theirs), expected, rtol=1e-4, atol=1e-4)
    if any(layer.unmergeable_reason() for layer in adapted_layers(model).values()):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge_and_unload(model)
    else:
        merged = merge_and_unload(copy.deepcopy(model))
        torch.testing.assert_close(logits(merged), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(logits(unload(model)), before)
