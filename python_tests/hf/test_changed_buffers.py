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
from align_ext.base_model.fingerprint import OtherBaseError


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


class Counts(nn.Module):
    """Has seen which channel how often above zero, and whether at all; looks at both in evaluation."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("counts", torch.zeros(channels, dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(channels, dtype=torch.bool))

    def forward(self, x):
        if self.training:
            self.counts += (x > 0).sum(0)
            self.seen |= (x > 1).any(0)
        return x + self.counts / (1 + self.counts.sum()) - self.seen.float()


class Bank(nn.Module):
    """Remembers rows: a buffer that grows, and one that there is not before the first."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("bank", torch.zeros(0, channels))
        self.register_buffer("first", None)

    def forward(self, x):
        if self.training:
            self.first = x[0].detach().clone() if self.first is None else self.first
            self.bank = torch.cat([self.bank, x[:1].detach()])
        x = x if self.first is None else x + self.first
        return x + self.bank.sum(0)


class Scaled(nn.Linear):
    """A linear layer with a running scale."""

    def __init__(self, channels):
        super().__init__(channels, channels)
        self.register_buffer("scale", torch.ones(channels))

    def forward(self, x):
        if self.training:
            self.scale.mul_(0.9).add_(0.1 * x.detach().abs().mean(0))
        return super().forward(x / self.scale)


KINDS = {
    "counts": lambda: Counts(8),
    "a bank that grows": lambda: Bank(8),
    "a linear layer's scale": lambda: Scaled(8),
    "spectral norm of old": lambda: torch.nn.utils.spectral_norm(nn.Linear(8, 8)),
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


def test_a_buffer_that_no_folder_can_hold_is_refused(tmp_path):
    model = adapted(base("counts"))
    model.norm.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))
    save_adapter(model, tmp_path / "as the base")
    model = Net(KINDS["counts"]())
    model.norm.register_buffer("phase", torch.zeros(3, dtype=torch.complex64))
    model = adapted(model)
    model.norm.phase += 1
    with pytest.raises(ValueError, match=r"norm\.phase is torch\.complex64, which no folder of an adapter holds"):
        save_adapter(model, tmp_path / "changed")


def test_another_base_by_its_buffers_alone_is_refused(tmp_path):
    save_adapter(train(adapted(base("batch norm"))), tmp_path)
    other = base("batch norm")
    other.norm.running_mean += 1
    with pytest.raises(OtherBaseError, match=r"'norm\.running_mean' has other values"):
        load_adapter(other, tmp_path)
    with pytest.raises(OtherBaseError, match=r"'norm\.running_mean' has other values"):
        load_adapter(adapted(other), tmp_path)
    load_adapter(other, tmp_path, force=True)


def test_what_is_not_finite_and_does_not_change_is_no_change(tmp_path):
    model = base("counts")
    model.norm.register_buffer("mask", torch.tensor([float("nan"), float("-inf")]))
    save_adapter(adapted(model), tmp_path)
    assert not (tmp_path / "align_trained.safetensors").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_of_the_model_is_no_change(tmp_path, dtype):
    model = base("an average of its own")
    model.norm.level += torch.rand(8)
    save_adapter(adapted(model).to(dtype), tmp_path)
    assert not (tmp_path / "align_trained.safetensors").exists()


def test_peft_gets_them_as_a_whole_module_or_not_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"norm\.\w+ is trained beside it.*modules_to_save=\['norm'\]"):
        export_peft(train(adapted(base("batch norm"))), tmp_path / "frozen")
    model = train(adapted(base("batch norm"), modules_to_save=["norm"]))
    export_peft(model, tmp_path / "whole")
    stock = PeftModel.from_pretrained(base("batch norm"), tmp_path / "whole")
    torch.testing.assert_close(outputs(stock), outputs(model), rtol=1e-5, atol=1e-6)
