"""Biases: those of the base that PEFT's option `bias` trains, and lora_bias, that of B; in PEFT's form, both ways."""

import copy
import json

import pytest
import torch
from hf.folders import assert_same_bits, logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import batch, gpt2, llama, qwen2

from align_ext import (
    AlignLoraConfig,
    adapter_report,
    disable_adapter,
    export_peft,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    unload,
)
from align_ext.base_model.modules_to_save import find_extra_tensors
from align_ext.merging.arithmetic import read_lora

WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bert():
    """Whose head has one bias under two names."""
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(**sizes, vocab_size=64)).eval()


CASES = {
    "all": (qwen2, {"target_modules": ["q_proj"], "bias": "all"}),
    "all, with a module": (gpt2, {"target_modules": ["c_attn"], "bias": "all", "modules_to_save": ["ln_f"]}),
    "all, with a tied one": (bert, {"target_modules": ["query", "transform.dense"], "bias": "all"}),
    "adapted layers'": (qwen2, {"target_modules": ["q_proj", "up_proj"], "bias": "lora_only"}),
    "of B": (qwen2, {"target_modules": ["q_proj", "k_proj"], "lora_bias": True}),
    "of B, Conv1D": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True}),
    "of B by layer, and all": (
        qwen2,
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"v_proj": 3}, "lora_bias": True, "bias": "all"},
    ),
}


def moved(model):
    """The model with other values of all that is trained."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def check_saved(architecture, base, model, folder):
    """The folder gives what the model gives, loaded again, and by PEFT where it has a form for it."""
    task = 1 if architecture == "multi_adapter" else None
    save_adapter(model, folder)
    assert torch.equal(logits(load_adapter(base(), folder), task), logits(model, task))
    stock = {"m_lora": folder, "multi_adapter": folder / "tasks" / "1"}.get(architecture)
    if stock is not None:
        theirs = PeftModel.from_pretrained(base(), stock)
        torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


def shapes(folder):
    """Of a folder's tensors, without those that PEFT writes twice."""
    again = (".modules_to_save.bias", ".original_module.bias")
    return {key: t.shape for key, t in load_file(folder / WEIGHTS).items() if not key.endswith(again)}


@pytest.mark.parametrize("case", CASES)
def test_it_is_trained_saved_and_read_as_by_peft(case, tmp_path):
    make, options = CASES[case]
    ours = replace_linear_with_align_lora(make(), LoraConfig(r=2, **options))
    theirs = moved(get_peft_model(make(), LoraConfig(r=2, **options)))
    count = sum(p.numel() for p in ours.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = load_adapter(make(), tmp_path / "theirs")
    torch.testing.assert_close(logits(loaded), logits(theirs), rtol=1e-5, atol=1e-5)
    save_adapter(loaded, tmp_path / "ours")
    moved(ours)
    expected = logits(ours)
    assert (expected - logits(make())).abs().max() > 1e-2
    save_adapter(ours, tmp_path / "trained")
    export_peft(ours, tmp_path / "exported")
    for folder in ("trained", "exported"):
        stock = PeftModel.from_pretrained(make(), tmp_path / folder)
        torch.testing.assert_close(logits(stock), expected, rtol=1e-5, atol=1e-5)
    for folder in ("ours", "trained"):
        assert shapes(tmp_path / folder) == shapes(tmp_path / "theirs")
        content = json.loads((tmp_path / folder / PEFT_CONFIG).read_text())
        assert (content["bias"], content["lora_bias"]) == (options.get("bias", "none"), "lora_bias" in options)
    again = load_adapter(make(), tmp_path / "trained")
    assert torch.equal(logits(again), expected)
    assert_same_bits(find_extra_tensors(again).tensors, find_extra_tensors(ours).tensors)
    load_adapter(moved(again), tmp_path / "trained")  # into a model that has adapters, as a checkpoint
    assert torch.equal(logits(again), expected)


@pytest.mark.parametrize("case", CASES)
def test_merged_disabled_and_unloaded(case):
    make, options = CASES[case]
    model = moved(replace_linear_with_align_lora(make(), r=2, align=None, **options))
    expected, base = logits(model), logits(make())
    with disable_adapter(model):
        assert torch.equal(logits(model), base)
    for approximate in ({}, {"approximate": "uniform", "batch": batch()[0]}):
        merged = merge_and_unload(copy.deepcopy(model), **approximate)
        torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    if "lora_bias" in options:
        layer = next(module for module in model.modules() if hasattr(module, "base_layer"))
        layer.merge()
        torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
        layer.unmerge()
        assert torch.equal(logits(model), expected)
    assert torch.equal(logits(unload(model)), base)


@pytest.mark.parametrize("architecture", ["m_lora", "hydra", "multi_adapter", "mtlora"])
def test_all_biases_beside_every_architecture(architecture, tmp_path):
    options = {"r": 2, "num_tasks": 3, "target_modules": ["q_proj"], "architecture": architecture, "bias": "all"}
    model = moved(replace_linear_with_align_lora(qwen2(), AlignLoraConfig(**options)))
    names = [f"model.layers.{i}.self_attn.{part}_proj.bias" for i in range(2) for part in "qkv"]
    assert sorted(find_extra_tensors(model).tensors) == sorted(names)
    check_saved(architecture, qwen2, model, tmp_path)


def gradients_of_b(model):
    """Of lora_bias by layer, of one step."""
    inputs, _ = batch()
    model.train()(**inputs).loss.backward()
    named = {name.removeprefix("base_model.model."): p.grad for name, p in model.named_parameters()}
    ends = (".lora_B.default.bias", ".adapter.lora_bias")
    return {name.removesuffix(end): grad for name, grad in named.items() for end in ends if name.endswith(end)}


@pytest.mark.parametrize("how", ["plain", "checkpointed", "compiled", "16 bits"])
def test_the_gradient_of_the_bias_of_b_is_pefts(how, tmp_path):
    options = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "lora_dropout": 0.0, "lora_bias": True}
    dtype = torch.bfloat16 if how == "16 bits" else torch.float64
    theirs = moved(get_peft_model(qwen2().to(dtype), LoraConfig(**options)))
    theirs.save_pretrained(tmp_path)
    ours = load_adapter(qwen2().to(dtype), tmp_path)
    if how == "checkpointed":
        ours.gradient_checkpointing_enable()
    if how == "compiled":
        ours.model.layers[0].self_attn.q_proj.compile(backend="aot_eager", fullgraph=True)
    expected, found = gradients_of_b(theirs), gradients_of_b(ours)
    assert len(found) == 6
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(
            found[name], expected[name], **({"rtol": 0.1, "atol": 1e-3} if how == "16 bits" else {})
        )


def test_a_layer_without_a_bias_does_not_take_the_bias_of_b(tmp_path):
    model = moved(replace_linear_with_align_lora(llama(), r=2, architecture="lora", lora_bias=True))
    save_adapter(model, tmp_path)
    theirs = PeftModel.from_pretrained(llama(), tmp_path)
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"cannot be merged: its adapter has a bias .* base layer has none"):
        merge_and_unload(model)
    with pytest.raises(ValueError, match="trains more than A and B"):
        read_lora(tmp_path)


def test_an_adopted_model_keeps_the_bias_of_b(tmp_path):
    theirs = moved(get_peft_model(qwen2(), LoraConfig(target_modules=["q_proj"], lora_bias=True)))
    expected, bias = logits(theirs), theirs.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].bias
    ours = replace_linear_with_align_lora(theirs, align=None)
    torch.testing.assert_close(logits(ours), expected)
    assert ours.base_model.model.model.layers[0].self_attn.q_proj.adapter.lora_bias is bias
    save_adapter(ours, tmp_path)
    torch.testing.assert_close(logits(load_adapter(qwen2(), tmp_path)), expected)


def test_a_model_without_biases_says_so():
    assert "bias='all': the model has no such biases" in str(
        adapter_report(replace_linear_with_align_lora(llama(), bias="all"))
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": "some"}, "bias must be .*lora_only.*, got 'some'"),
        ({"bias": "lora_only", "architecture": "mtlora"}, "bias='lora_only': whole blocks are adapted"),
        ({"lora_bias": True, "architecture": "m_lora"}, "lora_bias=True: it is the bias of a layer's only B"),
        ({"lora_bias": True, "architecture": "lora", "target_blocks": ["mlp"]}, "lora_bias=True: it is the bias"),
    ],
)
def test_what_has_no_meaning_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AlignLoraConfig(**options)


def test_a_folder_that_has_lost_biases_is_refused(tmp_path):
    get_peft_model(qwen2(), LoraConfig(target_modules=["q_proj"], bias="all")).save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    save_file({key: t for key, t in load_file(file).items() if not key.endswith("1.self_attn.k_proj.bias")}, file)
    with pytest.raises(ValueError, match=r"has bias='all' and no model\.layers\.1\.self_attn\.k_proj\.bias: some"):
        load_adapter(qwen2(), tmp_path)
