"""Models whose layers stock PEFT takes for others (mixtures of experts): it gets no folder that it would misread."""

import pytest
import torch
from hf.folders import files
from hf.mixtures import mixture
from peft import PeftModel
from rich.console import Console

from align_ext import export_peft, load_adapter, replace_linear_with_align_lora, save_adapter
from align_ext.io.inspect_adapter import inspect_adapter

KINDS = ("Glm4Moe", "Qwen3Next", "Qwen3Moe", "Ernie4_5_Moe", "Llama4Text")  # PEFT leaves the last one's names alone


def trained(kind, targets, **options):
    model = mixture(kind)
    options = {"r": 2, "target_modules": targets, "align": None, "lora_dropout": 0.0, "num_tasks": 2} | options
    replace_linear_with_align_lora(model, **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=torch.arange(1, 9)[None], use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [("gate_proj", "up_proj", "down_proj"), ("down_proj", "o_proj"), ("o_proj",)])
def test_stock_peft_computes_the_same_or_finds_no_adapter(kind, targets, tmp_path):
    model = trained(kind, targets)
    save_adapter(model, tmp_path)
    expected = logits(model)
    assert (expected - logits(mixture(kind))).abs().max() > 1e-2
    assert torch.equal(logits(load_adapter(mixture(kind), tmp_path)), expected)
    console = Console(record=True, width=200)
    inspect_adapter(tmp_path, console)
    if targets == ("o_proj",) or kind == "Llama4Text":
        assert "loads this folder" in console.export_text()
        theirs = PeftModel.from_pretrained(mixture(kind), tmp_path)
        torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=1e-5)
        return
    assert files(tmp_path) == ["README.md", "align_lora_config.json", "align_lora_heads.safetensors"]
    assert "cannot: it would misread" in console.export_text()
    with pytest.raises(ValueError, match="models it"):
        export_peft(model, tmp_path / "peft")
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
        PeftModel.from_pretrained(mixture(kind), tmp_path)


def test_the_folders_of_tasks_are_not_written_either(tmp_path):
    save_adapter(trained("Glm4Moe", ["down_proj"], architecture="multi_adapter"), tmp_path)
    assert files(tmp_path) == ["README.md", "align_lora_config.json", "align_lora_heads.safetensors"]
