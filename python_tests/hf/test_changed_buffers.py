"""Buffers of a frozen base that training changes (statistics, averages, counters): saved, loaded, given back."""

import copy

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from align_ext import (
    AlignLoraConfig,
    export_peft,
    load_adapter,
    merge_and_unload,
    replace_linear_with_align_lora,
    save_adapter,
    unload,
)


class Average(nn.Module):
    """Adds an average of what it has seen, which is a buffer, and counts."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("level", torch.zeros(channels))
        self.register_buffer("seen", torch.tensor(0))
        self.register_buffer("mask", torch.ones(channels, dtype=torch.bool))

    def forward(self, x):
        if self.training:
            self.level = 0.9 * self.level + 0.1 * x.detach().mean(0)
            self.seen += 1
        return x + self.level * self.mask


KINDS = {
    "batch norm": lambda: nn.BatchNorm1d(8),
    "batch norm without weights": lambda: nn.BatchNorm1d(8, affine=False),
    "instance norm": lambda: nn.Sequential(nn.Unflatten(1, (4, 2)), nn.InstanceNorm1d(4, track_running_stats=True),
                                           nn.Flatten()),
    "an average of its own": lambda: Average(8),
    "spectral norm": lambda: spectral_norm(nn.Linear(8, 8)),
}  # fmt: skip


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.q_proj, self.norm, self.head = nn.Linear(8, 8), norm, nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.norm(self.q_proj(x)))


def base(kind):
    torch.manual_seed(0)
    return Net(KINDS[kind]()).eval()


def adapted(model, **options):
    return replace_linear_with_align_lora(
        model, AlignLoraConfig(architecture="lora", r=2, lora_dropout=0.0, target_modules=["q_proj"], **options)
    )


def train(model, seed=1):
    torch.manual_seed(seed)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    for _ in range(3):
        model(torch.randn(5, 8) + 2).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def same_bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def outputs(model):
    torch.manual_seed(7)
    with torch.no_grad():
        return model.eval()(torch.randn(6, 8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_brings_back_what_the_trained_model_computes(tmp_path, kind):
    model = train(adapted(base(kind)))
    frozen = {name for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert not frozen
    save_adapter(model, tmp_path)
    same_bits(outputs(load_adapter(base(kind), tmp_path)), outputs(model))
    same_bits(outputs(load_adapter(train(adapted(base(kind)), seed=2), tmp_path)), outputs(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_changes_brings_back_the_base(tmp_path, kind):
    model = adapted(base(kind))
    save_adapter(model, tmp_path)
    assert not (tmp_path / "align_trained.safetensors").exists()
    same_bits(outputs(load_adapter(train(adapted(base(kind))), tmp_path)), outputs(base(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_unload_gives_back_the_base_and_merging_keeps_what_was_trained(tmp_path, kind):
    model = train(adapted(base(kind)))
    expected = outputs(model)
    assert not torch.equal(expected, outputs(base(kind)))
    merged = merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(outputs(merged), expected, rtol=1e-5, atol=1e-5)
    same_bits(outputs(unload(model)), outputs(base(kind)))
    save_adapter(train(adapted(base(kind))), tmp_path)
    same_bits(outputs(unload(load_adapter(base(kind), tmp_path))), outputs(base(kind)))


def test_peft_gets_them_as_a_whole_module_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"norm\.\w+ is trained beside it.*modules_to_save=\['norm'\]"):
        export_peft(train(adapted(base("batch norm"))), tmp_path / "frozen")
    model = train(adapted(base("batch norm"), modules_to_save=["norm"]))
    export_peft(model, tmp_path / "whole")
    stock = PeftModel.from_pretrained(base("batch norm"), tmp_path / "whole")
    torch.testing.assert_close(outputs(stock), outputs(model), rtol=1e-5, atol=1e-6)
