"""Layers whose frozen weight is quantised: in training they compute with the weight that it stands for, to the bit."""

import copy
from contextlib import nullcontext
from functools import partial

import bitsandbytes
import pytest
import torch
import torchao.quantization as torchao
from architectures import FROM_WEIGHT, ON_LAYERS, config_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from align_ext import align_step, replace_linear_with_align_lora
from align_ext.base_model.quantised import dequantised
from align_ext.ops import grouped_lora

IN, OUT, T = 128, 96, 24
TASKS = torch.arange(T) % 3


def bits4(layer, kind):
    made = bitsandbytes.nn.Linear4bit(IN, OUT, compress_statistics=kind == "nf4", quant_type=kind)
    made.load_state_dict(layer.state_dict())
    return made.to("cpu")  # which quantises


def of_torchao(layer, config):
    model = nn.Sequential(layer)
    torchao.quantize_(model, config())
    return model[0]


FORMS = {
    "nf4": partial(bits4, kind="nf4"),
    "fp4": partial(bits4, kind="fp4"),
    "torchao int8": partial(of_torchao, config=torchao.Int8WeightOnlyConfig),
    "torchao float8": partial(of_torchao, config=torchao.Float8WeightOnlyConfig),
}


def bases(form, dtype=torch.float32):
    """A quantised layer, and a plain one with the weight that it stands for."""
    torch.manual_seed(0)
    quantised = FORMS[form](nn.Linear(IN, OUT).to(dtype)).requires_grad_(False)
    plain = nn.Linear(IN, OUT).to(dtype)
    plain.weight.data = dequantised(quantised, dtype)().clone()
    plain.bias.data = quantised.bias.data.to(dtype)
    return quantised, plain


def adapted(base, config):
    torch.manual_seed(1)
    model = replace_linear_with_align_lora(nn.Sequential(base), config).train()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def trained(model, x, needs_step=True, through=lambda layer, x: layer(x)):
    """y, and the gradients of x and of all parameters."""
    torch.manual_seed(2)
    x = x.clone().requires_grad_()
    with align_step(model, TASKS) if needs_step else nullcontext() as step:
        y = through(model[0], x)
    loss = (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum()
    (step.total(loss) if step else loss).backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad)]


@pytest.mark.parametrize(
    "form", ["nf4", "torchao int8", *(pytest.param(form, marks=pytest.mark.slow) for form in ("fp4", "torchao float8"))]
)
@pytest.mark.parametrize("name", [n for n in ON_LAYERS if n not in FROM_WEIGHT and "by sequence" not in n])
def test_every_architecture_trains_as_beside_the_weight_that_is_stored(name, form):
    dropout = 0.0 if name == "lora, DoRA" else 0.2  # with it the layer's own product is taken
    config = config_of(name, target_modules=["0"], lora_dropout=dropout)
    x = torch.randn(T, IN, generator=torch.Generator().manual_seed(3))
    found, expected = (trained(adapted(base, config), x, config.needs_step) for base in bases(form))
    assert len(found) == len(expected) >= 4
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_changes_no_bit(form, dtype, reentrant):
    config = config_of("align_lora", target_modules=["0"], lora_dropout=0.2)
    x = torch.randn(T, IN).to(dtype)
    found, expected = (
        trained(adapted(bases(form, dtype)[0], config), x, through=through)
        for through in (partial(checkpoint, use_reentrant=reentrant), lambda layer, x: layer(x))
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
def test_evaluation_takes_the_layers_own_product(form):
    quantised, plain = bases(form)
    x, config = torch.randn(T, IN), config_of("lora", target_modules=["0"])
    own = quantised(x)
    model = adapted(quantised, config)
    model[0].adapter.lora_B.data.zero_()
    assert torch.equal(model.eval()(x), own)
    torch.testing.assert_close(own, plain(x), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_of_the_weights_size_is_kept_for_backward(form):
    model, kept = adapted(bases(form)[0], config_of("r_lora", target_modules=["0"])), []
    own = {t.untyped_storage().data_ptr() for t in model.parameters() if type(t) is nn.Parameter}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = model(torch.randn(T, IN, requires_grad=True))
    assert max(t.numel() for t in kept if t.untyped_storage().data_ptr() not in own) == T * IN
    y.sum().backward()


def test_what_rounds_its_input_keeps_its_own_product():
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    eight = bitsandbytes.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False)
    eight.load_state_dict(layer.state_dict())
    assert dequantised(eight.to("cpu"), torch.float32) is None
    dynamic = of_torchao(copy.deepcopy(layer), torchao.Int8DynamicActivationInt8WeightConfig)
    assert dequantised(dynamic, torch.float32) is None
    assert dequantised(layer, torch.float32) is None
    four = bits4(layer, "nf4")
    four.compute_dtype, four.compute_type_is_set = torch.bfloat16, True
    assert dequantised(four, torch.float32) is None
    assert dequantised(four, torch.bfloat16)().dtype == torch.bfloat16


@pytest.mark.parametrize("compiled", [False, True])
def test_a_function_makes_the_weight_once_in_each_direction(compiled):
    torch.manual_seed(0)
    x, W, calls = torch.randn(5, 7), torch.randn(6, 7), []
    A, B = torch.randn(3, 7, requires_grad=True), torch.randn(6, 3, requires_grad=True)

    def make():
        calls.append(len(calls))
        return W * 1

    def run(weight):
        leaf = x.clone().requires_grad_()
        y, _ = grouped_lora(leaf, A, B, 0.5, weight=weight)
        return y.detach(), *torch.autograd.grad(y.square().sum(), [leaf, A, B])

    expected = run(W)
    if compiled:  # the graph keeps or makes it again, as its partitioner decides
        torch._dynamo.reset()
        y, _ = torch.compile(lambda x: grouped_lora(x, A, B, 0.5, weight=lambda: W * 1), backend="aot_eager")(x)
        torch.testing.assert_close(y, expected[0])
        return
    for one, other in zip(run(make), expected, strict=True):
        assert torch.equal(one, other)
    assert calls == [0, 1]
    with torch.no_grad():
        assert torch.equal(grouped_lora(x, A, B, 0.5, weight=make)[0], expected[0])
    assert calls == [0, 1, 2]
