"""Merging routed adapters: refused, or by their mean with the distance measured."""

import logging

import pytest
import torch
from hf.folders import BLOCKS, MIXTURES, MODELS, ROUTED, TASKED, assert_same_bits, logits, plain, state, trained
from tiny import batch
from torch.distributions import Categorical, kl_divergence

from align_ext import merge_and_unload, set_task
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.linear_layer import is_conv1d
from align_ext.model.merge import MergeReport


def inputs():
    """With padding."""
    return {name: tensor for name, tensor in batch()[0].items() if name != "labels"}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("kind", ROUTED | BLOCKS | TASKED | MIXTURES)
def test_what_is_no_change_of_the_weight_is_refused_and_nothing_changed(kind):
    model = trained(kind)
    before = weights(model)
    reason = "beside a whole block" if kind in BLOCKS else "set_task" if kind in TASKED else "router"
    with pytest.raises(ValueError, match=rf"model\.layers\.0.* cannot be merged: .*{reason}"):
        merge_and_unload(model)
    assert_same_bits(weights(model), before)


def test_of_a_mixture_of_blocks_nothing_is_merged_and_no_approximation_either():
    model = trained("mixlora")
    before = weights(model)
    with pytest.raises(ValueError, match=r"mlp\.gate_proj cannot be merged: its block's router chooses experts anew"):
        merge_and_unload(model, approximate="uniform", batch=inputs())
    assert_same_bits(weights(model), before)


@pytest.mark.parametrize("base", MODELS)
@pytest.mark.parametrize("kind", ROUTED)
def test_the_uniform_mixture_is_merged_and_its_distance_is_the_kl_of_the_outputs(kind, base, caplog):
    model = trained(kind, base)
    deltas, before, mask = {}, model.eval()(**inputs()).logits.detach().double(), inputs()["attention_mask"].bool()
    for name, layer in adapted_layers(model).items():
        adapter, N = layer.adapter, layer.adapter.heads
        A = adapter.A if adapter.A_per_head else adapter.A.expand(N, -1, -1)
        delta = sum(B @ A for A, B in zip(A, adapter.lora_B, strict=True)) / N
        if adapter.lora_A0 is not None:
            delta = delta - adapter.lora_B0 @ adapter.lora_A0
        deltas[name] = adapter.scaling * (delta.T if is_conv1d(layer.base_layer) else delta)
    with caplog.at_level(logging.INFO, "align_ext"):
        assert merge_and_unload(model, approximate="uniform", batch=inputs()) is model
    bases = plain(base)
    for name, delta in deltas.items():
        torch.testing.assert_close(model.get_submodule(name).weight, bases.get_submodule(name).weight + delta)
    report, after = model.merge_report, model(**inputs()).logits.detach().double()
    expected = kl_divergence(Categorical(logits=before[mask]), Categorical(logits=after[mask])).mean()
    assert report.kl == pytest.approx(float(expected), rel=1e-3)
    assert report.kl > 1e-4
    assert report.tokens == int(mask.sum()) < mask.numel()
    assert report.agreement == pytest.approx(float((before.argmax(-1) == after.argmax(-1))[mask].float().mean()))
    assert str(report) in caplog.text


def test_a_router_of_zeros_is_merged_without_any_distance():
    model = trained("r_lora")
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.adapter.lora_router.lora_R.zero_()
    before = logits(model)
    merge_and_unload(model, approximate="uniform", batch=batch()[0])
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert abs(model.merge_report.kl) < 1e-6
    assert model.merge_report.agreement == 1


def test_the_approximation_of_what_is_exact_is_exact():
    model = trained("multi_adapter").eval()
    set_task(model, 1)
    before = logits(model)
    merge_and_unload(model, approximate="uniform", batch={**inputs(), "task_ids": batch()[1]})
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    assert abs(model.merge_report.kl) < 1e-6


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("hydra", {"approximate": "uniform"}, "give batch="),
        ("hydra", {"approximate": "mean"}, "approximate='mean' must be"),
        ("mtlora beside blocks", {"approximate": "uniform", "batch": inputs()}, "beside a whole block"),
    ],
)
def test_an_approximation_that_cannot_be_made_or_measured_is_refused(kind, options, message):
    model = trained(kind)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        merge_and_unload(model, **options)
    assert_same_bits(weights(model), before)


def test_a_batch_that_the_model_does_not_take_leaves_it_as_it_was():
    model = trained("hydra")
    before = state(model)
    with pytest.raises(ValueError, match="input_ids"):
        merge_and_unload(model, approximate="uniform", batch={"nonsense": 1})
    assert_same_bits(state(model), before)
    assert model.training


def test_an_adapter_that_is_merged_already_is_not_merged_again_by_approximation():
    model = trained("multi_adapter")
    set_task(model, 0)
    next(iter(adapted_layers(model).values())).merge()
    with pytest.raises(ValueError, match="merged already"):
        merge_and_unload(model, approximate="uniform", batch=inputs())


def test_a_report_says_how_far_in_one_line():
    text = str(MergeReport(kl=0.01234, agreement=0.875, tokens=16))
    assert text == (
        "KL of the outputs before and after the merge 0.0123 nats a token, the same likeliest next token in 87.5% of "
        "16 tokens"
    )


def overflow(model, name, value):
    """Makes the change of one weight of a layer as large as this."""
    adapter = adapted_layers(model)[name].adapter
    with torch.no_grad():
        for tensor in (adapter.lora_A, adapter.lora_B):
            tensor.zero_()
        adapter.lora_A.view(-1, adapter.in_features)[0, 0] = 1
        adapter.lora_B.view(-1, adapter.r)[0, 0] = value / adapter.scaling


@pytest.mark.parametrize("kind", ["lora", "m_lora", "hydra"])
@pytest.mark.parametrize(
    ("dtype", "value", "reason"),
    [
        (torch.float16, 1e6, r"too large for torch\.float16: load the base in bfloat16 or float32"),
        (torch.float32, float("nan"), "its adapter's change of the weight is not finite: load an earlier"),
        (torch.float16, float("inf"), "its adapter's change of the weight is not finite"),
        (torch.bfloat16, 1e6, None),
    ],
)
def test_a_weight_that_would_not_be_finite_is_not_merged_and_nothing_changed(kind, dtype, value, reason):
    model, last = trained(kind, dtype=dtype), "model.layers.1.mlp.down_proj"
    overflow(model, last, value)
    before = weights(model)
    options = {"approximate": "uniform", "batch": inputs()} if kind == "hydra" else {}
    if reason is None:
        assert all(torch.isfinite(p).all() for p in merge_and_unload(model, **options).parameters())
        return
    with pytest.raises(ValueError, match=f"{last} cannot be merged: .*{reason}"):
        merge_and_unload(model, **options)
    for name, tensor in weights(model).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num())
    layer = adapted_layers(model)[last]
    if layer.unmergeable_reason() is None:
        with pytest.raises(ValueError, match=reason):
            layer.merge()
        assert not layer.merged


def test_a_base_weight_that_is_not_finite_is_named():
    model, last = trained("lora"), "model.layers.1.mlp.down_proj"
    with torch.no_grad():
        adapted_layers(model)[last].weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=rf"{last} cannot be merged: the base weight holds values that are not finite"):
        merge_and_unload(model)


@pytest.mark.parametrize("safe", [True, False])
def test_what_peft_calls_safe_merge_is_the_default_and_without_it_earlier_layers_are_merged(safe):
    model = trained("lora")
    layers = list(adapted_layers(model).values())
    before = [layer.weight.clone() for layer in layers]
    with torch.no_grad():
        layers[-1].adapter.lora_B.fill_(float("inf"))
    with pytest.raises(ValueError, match="not finite"):
        merge_and_unload(model, safe_merge=safe)
    assert torch.equal(layers[0].weight, before[0]) == safe
    assert torch.equal(layers[-1].weight, before[-1])


def test_pefts_adapter_names_are_the_active_adapter_or_refused():
    model = trained("lora")
    with pytest.raises(
        ValueError, match=r"adapter_names=\['other'\]: the active adapter, 'default', is merged: choose"
    ):
        merge_and_unload(model, adapter_names=["other"])
    expected = logits(model)
    torch.testing.assert_close(logits(merge_and_unload(model, safe_merge=True, adapter_names=["default"])), expected)
