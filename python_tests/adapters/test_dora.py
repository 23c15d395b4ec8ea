"""DoRA beside a layer: a case by hand, its equations, PEFT's, and what of it must not cost or change anything."""

import copy

import pytest
import torch
from adapters.test_architectures import adapted_layer, batch, conv1d
from literal import dora
from peft import LoraConfig, get_peft_model
from torch import nn

from align_ext import AlignLoraConfig, replace_linear_with_align_lora
from align_ext.adapters.dora import row_norms

EXACT = 1e-12  # float64
KINDS = {
    "lora": {},
    "lora, pissa": {},
    "m_lora, sum": {},
    "m_lora, mean": {"dropout_site": "input"},
    "hydra without router, orthogonal": {},
    "multilora": {},
    "nlora, nystrom": {},
}


def test_a_case_by_hand():
    """W = [[3, 0], [0, 2]], s B A = [[0, 4], [0, 0]]: V has the norms 5 and 2; m = [10, 2], so that g = [2, 1]."""
    base = nn.Linear(2, 2)
    base.weight.data, base.bias.data = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([1.0, -1.0])
    options = {"architecture": "lora", "r": 1, "lora_alpha": 2, "lora_dropout": 0.0, "use_dora": True}
    model = replace_linear_with_align_lora(nn.Sequential(base), target_modules=["0"], **options)
    adapter = model[0].adapter
    assert adapter.lora_magnitude_vector.tolist() == [3.0, 2.0]
    adapter.lora_A.data, adapter.lora_B.data = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0], [0.0]])
    adapter.lora_magnitude_vector.data = torch.tensor([10.0, 2.0])
    y = model(torch.tensor([[1.0, 1.0]]))
    assert y.tolist() == [[2 * (3 + 4) + 1, 2 - 1]]
    y.sum().backward()
    assert adapter.lora_magnitude_vector.grad.tolist() == pytest.approx([7 / 5, 2 / 2])  # V x / ||V||
    assert adapter.lora_A.grad.tolist() == [[4.0, 4.0]]  # s (B * g)ᵀ 1 x
    assert adapter.lora_B.grad.tolist() == [[8.0], [4.0]]  # s g A x: the norms are constants


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("base", [nn.Linear, conv1d])
def test_the_layer_is_its_equations_written_out(name, p, base):
    model, config = adapted_layer(name, base, start=False, use_dora=True, lora_dropout=p, **KINDS[name])
    layer, (x, _, _) = model[0], batch()
    x.requires_grad_()
    leaves = {"x": x, **dict(layer.adapter.named_parameters())}
    weight = torch.randn(3, 5, 10, generator=torch.Generator().manual_seed(5), dtype=x.dtype)
    results = []
    for compute in (model, lambda x: layer.base_layer(x) + dora(layer, config, x, p).low):
        torch.manual_seed(3)
        y = compute(x)
        results.append([y, *torch.autograd.grad((y * weight).sum(), leaves.values())])
    for key, actual, expected in zip(["y", *leaves], *results, strict=True):
        assert expected.abs().max() > 0, key
        assert (actual - expected).abs().max() < EXACT * expected.abs().max(), key


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_without_dropout_it_is_pefts_to_the_gradients(bias, training):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 10, bias=bias)).double()
    config = LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"])
    peft = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    model = replace_linear_with_align_lora(base, config=AlignLoraConfig(
        architecture="lora", r=4, lora_alpha=6, lora_dropout=0.0, use_dora=True, target_modules=["0"]
    ))  # fmt: skip
    theirs, ours = peft.base_model.model[0], model[0].adapter
    pairs = [
        (theirs.lora_magnitude_vector["default"].weight, ours.lora_magnitude_vector),
        (theirs.lora_A["default"].weight, ours.lora_A),
        (theirs.lora_B["default"].weight, ours.lora_B),
    ]
    torch.testing.assert_close(pairs[0][0], pairs[0][1], rtol=1e-14, atol=0)
    for one, other in pairs:
        one.data = one.data.double() + 0.3 * torch.randn_like(one, dtype=torch.float64)
        other.data.copy_(one.data)
    x, _, _ = batch()
    y, expected = model.train(training)(x), peft.train(training)(x)
    for output in (y, expected):
        output.square().sum().backward()
    assert (y - expected).abs().max() < EXACT * expected.abs().max()
    for one, other in pairs:
        assert (one.grad - other.grad).abs().max() < EXACT * one.grad.abs().max()


@pytest.mark.parametrize(("dtype", "wide"), [(torch.float32, torch.float32), (torch.bfloat16, torch.float32)])
def test_the_norms_are_those_of_float32_also_where_the_adapter_takes_the_weight_off(dtype, wide):
    """An expansion in W Aᵀ and A Aᵀ would lose all digits in the last row."""
    generator = torch.Generator().manual_seed(0)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((900, 700), (8, 700), (900, 8)))
    W[-1] = (-B @ A)[-1] * 2
    W = W.to(dtype)
    W[-1, 0] += 1
    norms = row_norms(W, [(A, B)], 2.0)
    exact = torch.linalg.vector_norm(W.double() + 2 * B.double() @ A.double(), dim=1)
    assert norms.dtype == wide
    assert ((norms - exact) / exact)[:-1].abs().max() < 1e-6
    assert abs(norms[-1] - exact[-1]) < 1e-4


def test_the_magnitudes_are_float32_whatever_the_base_is():
    x, _, _ = batch(torch.bfloat16)
    for adapter_dtype in ("float32", "base"):
        model, _ = adapted_layer("lora", dtype=torch.bfloat16, use_dora=True, adapter_dtype=adapter_dtype)
        assert model[0].adapter.lora_magnitude_vector.dtype == torch.float32
        plain, _ = adapted_layer("lora", dtype=torch.bfloat16, adapter_dtype=adapter_dtype)
        assert torch.equal(model.eval()(x), plain.eval()(x))


def test_a_row_of_zeros_stays_one():
    model, _ = adapted_layer("lora", use_dora=True, lora_dropout=0.0)
    with torch.no_grad():
        model[0].base_layer.weight[3] = 0
        model[0].adapter.lora_magnitude_vector[3] = 0
    x, _, _ = batch()
    y = model(x)
    y.square().sum().backward()
    assert torch.equal(y[..., 3], model[0].bias[3].expand(3, 5))
    assert all(torch.isfinite(p.grad).all() for p in model[0].adapter.parameters())
    assert torch.isfinite(model[0].merged_weight()).all()


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_autocast_computes_the_norms_in_float32(p):
    model, _ = adapted_layer("lora", dtype=torch.float32, start=False, use_dora=True, lora_dropout=p)
    norms, (x, _, _) = model[0].row_norms(), batch(torch.float32)
    results = []
    for enabled in (False, True):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert torch.equal(model[0].row_norms(), norms)
            results.append(model(x))
    assert results[1].dtype == torch.bfloat16
    torch.testing.assert_close(results[1].float(), results[0], rtol=0.02, atol=0.03)


def test_a_weight_that_is_not_there_is_refused_with_the_cure():
    model, _ = adapted_layer("lora", use_dora=True)
    x, _, _ = batch()
    model[0].base_layer.weight.ds_id = 0
    with pytest.raises(ValueError, match=r"parts of the base weight .ZeRO-3.: train with ZeRO-2 or FSDP2"):
        model(x)
    del model[0].base_layer.weight.ds_id
    model[0].base_layer.to("meta")
    with pytest.raises(ValueError, match="the base weight is offloaded: load the base on one device"):
        model(x)


@pytest.mark.parametrize("base", [nn.Linear, conv1d])
@pytest.mark.parametrize("name", ["lora", "m_lora, sum"])
def test_a_compiled_layer_is_one_graph_and_computes_the_same(name, base):
    torch._dynamo.reset()
    model, _ = adapted_layer(name, base, start=False, use_dora=True)
    x, _, _ = batch()
    results = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        model.zero_grad()
        torch.manual_seed(3)
        y = call(x)
        y.square().sum().backward()
        results.append([y, *(p.grad for p in model.parameters() if p.requires_grad)])
    for one, other in zip(*results, strict=True):
        assert (one - other).abs().max() < EXACT * one.abs().max()


@pytest.mark.parametrize("options", [
    {"architecture": "hydra"}, {"architecture": "lora_moe"}, {"architecture": "r_lora"},
    {"architecture": "multi_adapter", "num_tasks": 2}, {"architecture": "moelora", "num_tasks": 2},
    {"architecture": "mtlora", "target_blocks": ()},
    {"architecture": "lora", "target_blocks": ("mlp",)},
])  # fmt: skip
def test_what_has_no_one_weight_is_refused(options):
    with pytest.raises(ValueError, match=r"use_dora=True: .* one .*weight"):
        AlignLoraConfig(use_dora=True, **options)


@pytest.mark.parametrize("base", [nn.Linear, conv1d])
def test_the_change_of_the_weight_is_the_rescaled_one(base):
    model, _ = adapted_layer("lora", base, start=False, use_dora=True)
    layer, (x, _, _) = model.eval()[0], batch()
    actual = model(x) - layer.base_layer(x)
    assert (actual - x @ layer.delta_weight().T).abs().max() < EXACT * actual.abs().max()
