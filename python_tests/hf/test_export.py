"""Adapters in and out: stock PEFT loads what we save, loading is strict, merging is exact."""

import json

import pytest
import torch
from hf.test_replace import gpt2, qwen2
from safetensors.torch import load_file, save_file
from tiny import adapted, batch, llama
from torch import nn
from torch.nn.utils import prune

from align_ext import load_adapter, merge_and_unload, replace_linear_with_align_lora, save_adapter, unload
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.adapters.linear_layer import is_conv1d

CASES = {
    "llama": (llama, {}),
    "llama, rslora": (llama, {"use_rslora": True, "r": 3}),
    "llama, one layer by full name": (llama, {"target_modules": ["model.layers.1.mlp.up_proj"]}),
    "qwen2, all-linear": (qwen2, {"target_modules": "all-linear"}),
    "gpt2, Conv1D": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"]}),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(**batch()[0]).logits


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_loads_the_folder_with_the_same_logits(case, tmp_path):
    from peft import PeftModel

    make, options = CASES[case]
    model = adapted(make(), torch.float32, **options)
    save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "align_lora_config.json",
    ]  # fmt: skip
    peft = PeftModel.from_pretrained(make(), tmp_path / "adapter")
    ours, theirs = logits(model), logits(peft)
    assert (ours - logits(make())).abs().max() > 1e-3
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_our_own_loader_gives_the_same_bits(case, tmp_path):
    make, options = CASES[case]
    model = adapted(make(), torch.float32, **options)
    save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(make(), tmp_path / "adapter")
    assert torch.equal(logits(model), logits(loaded))
    assert loaded.align_state.config == model.align_state.config


def test_an_adopted_adapter_of_mixed_ranks_survives_saving(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    options = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 10}}
    peft = get_peft_model(llama(), LoraConfig(r=4, target_modules=["up_proj", "down_proj"], **options))
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    expected = logits(peft)
    save_adapter(replace_linear_with_align_lora(peft), tmp_path / "adapter")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(llama(), tmp_path / "adapter")), expected)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path / "adapter")), expected)


@pytest.mark.parametrize("case", CASES)
def test_merging_keeps_the_outputs_and_removes_every_trace(case):
    make, options = CASES[case]
    model = adapted(make(), torch.float32, **options)
    before = logits(model)
    names = [n for n, _ in make().named_parameters()]
    assert merge_and_unload(model) is model
    assert [n for n, _ in model.named_parameters()] == names
    assert not hasattr(model, "align_state")
    assert not model._forward_hooks
    assert not model._forward_pre_hooks_with_kwargs
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_merging_a_16_bit_base_rounds_once(case):
    make, options = CASES[case]
    model = adapted(make(), torch.bfloat16, **options)
    expected = {}
    for name, layer in adapted_layers(model).items():
        delta = layer.adapter.scaling * (layer.adapter.lora_B @ layer.adapter.lora_A)
        delta = delta.T if is_conv1d(layer.base_layer) else delta
        expected[name] = (layer.weight.float() + delta).bfloat16()
    merge_and_unload(model)
    for name, weight in expected.items():
        assert torch.equal(model.get_submodule(name).weight, weight), name


def test_a_layer_that_cannot_be_merged_stops_before_anything_changed():
    from hf.test_replace import PackedLinear

    model = llama()
    model.model.layers[1].mlp.down_proj = PackedLinear(model.model.layers[1].mlp.down_proj)
    model = adapted(model, torch.float32)
    before = logits(model)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj cannot be merged: .*quantised"):
        merge_and_unload(model)
    assert torch.equal(logits(model), before)


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked():
    layer = nn.Linear(4, 3)
    layer.register_forward_hook(lambda module, args, y: 3 * y)
    return layer


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Doubling(4, 3), "Doubling has a forward of its own"),
        (hooked, "has hooks"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), "computed from others"),
        (lambda: prune.l1_unstructured(nn.Linear(4, 3), "weight", 2), "computed from others"),
    ],
)
def test_a_base_whose_output_is_not_its_weights_product_is_not_merged(make, reason):
    model = replace_linear_with_align_lora(nn.Sequential(make()), r=2, target_modules=["0"], align=None)
    with pytest.raises(ValueError, match=f"0 cannot be merged: .*{reason}"):
        merge_and_unload(model)


def test_a_folder_that_does_not_fit_leaves_a_plain_model_plain(tmp_path):
    save_adapter(adapted(llama(), torch.float32), tmp_path)
    corrupt(tmp_path, lambda t: t.pop(KEY))
    model = llama()
    with pytest.raises(ValueError, match="1 keys are missing"):
        load_adapter(model, tmp_path)
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())
    assert not model._forward_pre_hooks


def test_a_file_is_no_place_for_an_adapter(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file, not a folder"):
        save_adapter(adapted(llama(), torch.float32), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_unloading_gives_the_base_back():
    model = adapted(llama(), torch.float32)
    assert torch.equal(logits(unload(model)), logits(llama()))
    assert not any(isinstance(m, AdaptedLinear) for m in model.modules())
    replace_linear_with_align_lora(model)  # and it can be adapted again
    with pytest.raises(ValueError, match="no adapters"):
        unload(llama())


def corrupt(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


KEY = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY), "1 keys are missing"),
        (lambda t: t.update(extra=torch.zeros(1)), "1 are unexpected"),
        (
            lambda t: t.update({KEY: torch.zeros(4, 7)}),
            "holds other tensors than align_lora_config.json was written for",
        ),
        (lambda t: t[KEY].fill_(float("nan")), "not finite"),
    ],
)
def test_loading_is_strict(change, message, tmp_path):
    save_adapter(adapted(llama(), torch.float32), tmp_path)
    corrupt(tmp_path, change)
    model = adapted(llama(), torch.float32)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert torch.equal(logits(model), before)


def test_a_damaged_or_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="no adapter folder"):
        load_adapter(llama(), tmp_path / "nowhere")
    save_adapter(adapted(llama(), torch.float32), tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="is damaged"):
        load_adapter(llama(), tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = adapted(llama(), torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.adapter.lora_B[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"up_proj\.lora_B holds values that are not finite"):
        save_adapter(model, tmp_path / "adapter")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_stock_peft_loads(tmp_path):
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(llama(), LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"]))
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    peft.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_adapter(llama(), tmp_path)), logits(peft))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"use_dora": True}))
    with pytest.raises(ValueError, match=r"use_dora=True, but .* holds no lora_magnitude_vector"):
        load_adapter(llama(), tmp_path)
