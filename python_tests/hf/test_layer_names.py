"""Layers of any name come back out of a folder; names that reading refuses are refused before training."""

import pytest
import torch
from hostile import refused
from torch import nn

from align_ext import AlignLoraConfig, load_adapter, replace_linear_with_align_lora, save_adapter
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.io.adapter_folder import AdapterFolder


def model(name):
    torch.manual_seed(0)
    inner = nn.Module()
    inner.add_module(name, nn.Linear(8, 8))
    inner.forward = lambda x: inner.get_submodule(name)(x)
    return nn.Sequential(inner, nn.Linear(8, 8))


def adapted(name, architecture):
    config = AlignLoraConfig(architecture=architecture, target_modules="all-linear", r=2, num_tasks=2, align=None)
    return replace_linear_with_align_lora(model(name), config)


@pytest.mark.parametrize("architecture", ["lora", "hydra"])
@pytest.mark.parametrize(
    "name", ["lora_proj", "lora_A", "flora_B", "base_layer", "lora_router", "original_module", "adapter"]
)
def test_layers_named_as_parts_of_adapters_come_back(name, architecture, tmp_path):
    trained = adapted(name, architecture)
    with torch.no_grad():
        for p in trained.parameters():
            p.add_(0.1 if p.requires_grad else 0)
    save_adapter(trained, tmp_path)
    assert f"0.{name}" in AdapterFolder.read(tmp_path).adapters
    again, x = load_adapter(model(name), tmp_path), torch.randn(3, 8)
    torch.testing.assert_close(again.eval()(x), trained.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["a\nb", "x" * 3000, "x" * 990])
def test_names_that_a_folder_cannot_hold_are_refused_before_training(name):
    base = model(name)
    config = AlignLoraConfig(architecture="lora", target_modules="all-linear", r=2, align=None)
    refused(replace_linear_with_align_lora, base, config, match="cannot hold")
    assert not any(isinstance(module, AdaptedLinear) for module in base.modules())
    assert all(p.requires_grad for p in base.parameters())
