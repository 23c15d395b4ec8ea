"""What llama.cpp and vLLM read in an exported folder: names that they know, and the scaling alpha / r in every layer.

Neither is installed here. llama.cpp's convert_lora_to_gguf.py takes lora_alpha alone, and llama.cpp divides it by the
rows of a layer's A; vLLM takes r and lora_alpha, and older ones know neither rank_pattern nor alpha_pattern.
"""

import json

import gguf
import pytest
import torch
from hf.folders import ONE_LORA, logits, plain, trained
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from align_ext import export_peft, load_adapter, replace_linear_with_align_lora, save_adapter
from align_ext.io.peft_format import PEFT_CONFIG, WEIGHTS


def layers_of(folder):
    """Returns A and B of each layer of a folder."""
    tensors = load_file(folder / WEIGHTS)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert len(tensors) == 2 * len(names)  # which the converter demands
    part = "{}.lora_{}.weight"
    return {n.removeprefix("base_model.model."): [tensors[part.format(n, x)] for x in "AB"] for n in names}


def served(folder):
    """The logits of the base with s B A added to each weight, s as llama.cpp computes it."""
    model, config = plain(), json.loads((folder / PEFT_CONFIG).read_text())
    with torch.no_grad():
        for name, (A, B) in layers_of(folder).items():
            assert A.shape[0] == config["r"]  # so that vLLM's s is the same
            model.get_submodule(name).weight.add_(config["lora_alpha"] / A.shape[0] * B @ A)
    return logits(model)


@pytest.mark.parametrize("kind", ONE_LORA)
def test_the_scaling_of_an_exported_folder_is_alpha_over_r(kind, tmp_path):
    model = trained(kind)
    export_peft(model, tmp_path)
    assert not json.loads((tmp_path / PEFT_CONFIG).read_text())["use_rslora"]
    torch.testing.assert_close(served(tmp_path), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_an_exported_folder_of_mixed_ranks_has_one_rank_and_one_alpha(rslora, tmp_path):
    options = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 10}, "use_rslora": rslora}
    peft = get_peft_model(plain(), LoraConfig(r=4, target_modules=["up_proj", "down_proj"], **options))
    for name, p in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    expected = logits(peft)
    model = replace_linear_with_align_lora(peft, align=None)
    save_adapter(model, tmp_path / "adapter")
    export_peft(model, tmp_path / "exported")
    torch.testing.assert_close(served(tmp_path / "exported"), expected, rtol=1e-5, atol=1e-5)
    config = json.loads((tmp_path / "exported" / PEFT_CONFIG).read_text())
    assert not any("pattern" in option for option in config)
    for name, (A, B) in layers_of(tmp_path / "adapter").items():  # which has the ranks that were trained
        r = 2 if "down_proj" in name else 4
        assert (A.shape[0], B.shape[1]) == (r, r)
    torch.testing.assert_close(logits(load_adapter(plain(), tmp_path / "exported")), expected, rtol=1e-5, atol=1e-5)


def test_llama_cpp_knows_the_name_of_every_exported_layer(tmp_path):
    model = replace_linear_with_align_lora(plain(), r=2, target_modules="all-linear", align=None)
    export_peft(model, tmp_path)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    names = {known.get_name(f"{name}.weight", try_suffixes=(".weight",)) for name in layers_of(tmp_path)}
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    blocks = range(model.config.num_hidden_layers)
    assert names - {"output.weight"} == {f"blk.{block}.{part}.weight" for block in blocks for part in parts}
