"""dropout_sum: forward and every gradient against the float64 reference."""

from functools import partial

import heads_cases
import pytest
import torch
from heads_cases import DTYPES, EVERY_SITE, RNG, SHAPES, call, compare, leaves_of, make, results
from torch.library import opcheck

from align_ext import ops, reference

FORMS = pytest.mark.parametrize("weight_form", [True, False], ids=["weight", "base_out"])


def dropout(site):
    return 0.0 if site == "none" else 0.3


def test_a_hand_computed_case(device):
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], device=device, requires_grad=True)
    A = torch.tensor([[1.0, 1.0]], device=device, requires_grad=True)
    B = torch.tensor([[[2.0], [0.0]], [[1.0], [-1.0]]], device=device, requires_grad=True)
    A0 = torch.tensor([[0.0, 1.0]], device=device)
    B0 = torch.tensor([[1.0], [0.0]], device=device)
    base = torch.zeros(2, 2, device=device, requires_grad=True)
    y, z = ops.dropout_sum(x, A, B, 0.5, base_out=base, A0=A0, B0=B0)
    assert z.tolist() == [[3.0], [2.0]]
    assert y.tolist() == [[3.5, -1.5], [3.5, -1.0]]  # 0.5 (3 z, -z) less 0.5 (x_2, 0)
    y.backward(torch.tensor([[1.0, 0.0], [0.0, 2.0]], device=device))
    # du_i = 0.5 dy B_i = [1, 0], [0.5, -1];  dz = [1.5, -1];  dA = dzᵀ x;  dB_i = 0.5 dyᵀ z
    assert A.grad.tolist() == [[-1.5, 4.0]]
    assert B.grad.tolist() == [[[1.5], [2.0]]] * 2
    assert x.grad.tolist() == [[1.5, 1.0], [-1.0, -1.0]]  # dz A less 0.5 dy B0 A0
    assert base.grad.tolist() == [[1.0, 0.0], [0.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@EVERY_SITE
@FORMS
def test_forward_and_every_gradient_match_the_reference(device, dtype, shape, site, weight_form):
    inputs = partial(make, shape, dtype, site=site)
    compare("dropout_sum", device, inputs, site=site, dropout_p=dropout(site), weight_form=weight_form)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:2])
@EVERY_SITE
def test_the_offset_path_and_the_mean_match_the_reference(device, dtype, shape, site):
    for offset_rank, reduce in ((3, "mean"), (9, "sum")):
        inputs = partial(make, shape, dtype, site=site, offset_rank=offset_rank)
        compare("dropout_sum", device, inputs, site=site, dropout_p=dropout(site), reduce=reduce)


@EVERY_SITE
def test_without_dropout_every_site_matches_the_reference(device, site):
    inputs = partial(make, (40, 72, 56, 8, 3), torch.float32, site=site, offset_rank=4)
    compare("dropout_sum", device, inputs, site=site, weight_form=False)


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("site", ["latent", "input_per_head"])
def test_many_tiles_in_every_direction_are_right(device, dtype, site):
    inputs = partial(make, (257, 520, 712, 12, 4), dtype, site=site, offset_rank=12)
    compare("dropout_sum", device, inputs, site=site, dropout_p=0.1, weight_form=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FORMS
def test_float32_adapters_on_a_16_bit_input(device, dtype, weight_form):
    inputs = partial(make, (40, 72, 56, 8, 3), dtype, adapters=torch.float32, offset_rank=8)
    actual = compare("dropout_sum", device, inputs, dropout_p=0.1, weight_form=weight_form)
    assert actual["dA"].dtype == actual["dB[0]"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_SITE
def test_the_low_rank_term_alone_is_right(device, dtype, site):
    """With W = 0 nothing of the base can hide an error of the low-rank term."""
    inputs = partial(make, (50, 90, 70, 9, 3), dtype, site=site, base=0)
    compare("dropout_sum", device, inputs, site=site, dropout_p=dropout(site))


@EVERY_SITE
def test_strided_views_and_leading_dimensions(device, site):
    leaves = leaves_of(make((24, 40, 32, 6, 3), torch.float32, site=site, offset_rank=2), device)
    options = {"site": site, "dropout_p": dropout(site)}
    y, z = call("dropout_sum", leaves, **options)
    wide = torch.randn(2, 12, 80, device=device)
    wide[..., ::2] = leaves["x"].detach().view(2, 12, 40)
    leaves |= {"x": wide[..., ::2], "A": leaves["A"].T.contiguous().T, "B": leaves["B"].mT.contiguous().mT}
    assert not any(leaves[name].is_contiguous() for name in ("x", "A", "B"))
    yv, zv = call("dropout_sum", leaves, **options)
    assert yv.shape == (2, 12, 32)
    assert torch.equal(yv.reshape(24, 32), y)
    assert torch.equal(zv, z)


@pytest.mark.needs("float64")
@EVERY_SITE
@FORMS
def test_gradcheck_of_y_and_z_together(site, weight_form):
    inputs = make((6, 5, 4, 3, 2), torch.float64, site=site, offset_rank=2)
    leaves = leaves_of(inputs)
    names = ("x", "A", "B") if weight_form else ("x", "A", "B", "base")

    def function(*tensors):
        options = {"site": site, "dropout_p": dropout(site), "weight_form": weight_form}
        return call("dropout_sum", leaves | dict(zip(names, tensors, strict=True)), **options)

    assert torch.autograd.gradcheck(function, [leaves[name] for name in names])


@FORMS
@pytest.mark.parametrize("site", [1, 2, 3])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_opcheck(device, weight_form, site, p):
    leaves = leaves_of(make((12, 10, 8, 4, 3), torch.float32, offset_rank=2), device)
    x, A, B, A0, B0 = (leaves[name] for name in ("x", "A", "B", "A0", "B0"))
    rng = RNG.to(device) if p else None
    weight, bias, base = (leaves["W"], leaves["bias"], None) if weight_form else (None, None, leaves["base"])
    args = (x, A, B, 0.5, -1.5, A0, B0, site, p, rng, weight, bias, base)
    opcheck(torch.ops.align_ext.dropout_sum.default, args)
    y, z = (t.detach() for t in torch.ops.align_ext.dropout_sum(*args))
    x, A, B = (t.detach() for t in (x, A, B))
    backward = (y, z, x, z, A, B, 0.5, -1.5, A0, B0, site, p, rng, weight, True)
    opcheck(torch.ops.align_ext.dropout_sum_backward.default, backward)


@EVERY_SITE
def test_compiles_without_a_graph_break(device, site):
    leaves = leaves_of(make((16, 12, 10, 4, 3), torch.float32), device)

    def loss(x, A, B):
        y, z = call("dropout_sum", leaves | {"x": x, "A": A, "B": B}, site=site, dropout_p=dropout(site))
        return (y * leaves["dy"]).sum() + z.square().sum()

    trained = [leaves[name] for name in ("x", "A", "B")]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(heads_cases.gradients(compiled, trained), heads_cases.gradients(loss, trained), strict=True):
        assert torch.equal(a, b)


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_SITE
def test_the_same_bits_twice_and_for_any_number_of_threads(device, dtype, site):
    inputs = make((301, 130, 70, 8, 3), dtype, site=site, offset_rank=4)
    options = {"site": site, "dropout_p": dropout(site), "weight_form": False}
    heads_cases.same_bits_for_any_number_of_threads(lambda: results("dropout_sum", inputs, device, **options))


def test_permuting_the_heads_permutes_their_gradients(device):
    inputs, order = make((30, 40, 24, 8, 4), torch.float32), [2, 0, 3, 1]
    plain = results("dropout_sum", inputs, device)
    permuted = results("dropout_sum", inputs | {"B": inputs["B"][order], "dy": inputs["dy"]}, device)
    for place, head in enumerate(order):
        torch.testing.assert_close(permuted[f"dB[{place}]"], plain[f"dB[{head}]"])
    for name in ("y", "dx", "dA"):
        torch.testing.assert_close(permuted[name], plain[name])


@EVERY_SITE
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_without_dropout_it_is_lora_with_the_heads_summed(device, site, reduce):
    inputs = make((30, 40, 24, 8, 4), torch.float32, site=site)
    leaves = leaves_of(inputs, device)
    y = call("dropout_sum", leaves, site=site, reduce=reduce)[0]
    summed = inputs["B"].sum(0) / (4 if reduce == "mean" else 1)
    x, A, W, bias = (inputs[name] for name in ("x", "A", "W", "bias"))
    torch.testing.assert_close(y.cpu(), reference.grouped_lora(x, A, summed, 0.75, weight=W, bias=bias)[0])


@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_the_offset_makes_the_initial_heads_no_change(device, reduce):
    inputs = make((30, 40, 24, 8, 4), torch.float32)
    inputs["A0"], inputs["B0"] = inputs["A"], getattr(inputs["B"], reduce)(0)
    y = call("dropout_sum", leaves_of(inputs, device), reduce=reduce)[0]
    base = torch.nn.functional.linear(inputs["x"], inputs["W"], inputs["bias"])
    torch.testing.assert_close(y.cpu(), base)


@pytest.mark.parametrize("site", ["input", "latent", "input_per_head"])
def test_heads_with_their_own_masks_differ_and_a_shared_mask_leaves_them_alike(device, site):
    inputs = make((30, 40, 24, 8, 2), torch.float32, site=site)
    inputs["B"] = inputs["B"][:1].expand(2, -1, -1).contiguous()
    inputs["dz"] = torch.zeros_like(inputs["dz"])
    actual = results("dropout_sum", inputs, device, site=site, dropout_p=0.5)
    assert torch.equal(actual["dB[0]"], actual["dB[1]"]) == (site == "input")


@EVERY_SITE
def test_nothing_but_x_z_and_the_generators_state_is_saved(device, site):
    leaves = leaves_of(make((64, 128, 96, 8, 3), torch.float32, site=site), device)
    saved = heads_cases.bytes_saved(lambda: call("dropout_sum", leaves, site=site, dropout_p=dropout(site)))
    for name in ("x", "A", "B", "W"):
        saved.pop(leaves[name].untyped_storage().data_ptr())
    z = 4 * 64 * 8 * (3 if site == "input_per_head" else 1)
    assert sum(saved.values()) <= z + 16


def test_inputs_are_not_modified(device):
    leaves = leaves_of(make((12, 10, 8, 4, 2), torch.float32, offset_rank=2), device)
    copies = {name: t.detach().clone() for name, t in leaves.items()}
    y, z = call("dropout_sum", leaves, weight_form=False)
    torch.autograd.backward([y, z], [leaves["dy"], leaves["dz"]])
    assert all(torch.equal(leaves[name], copy) for name, copy in copies.items())


def test_the_masks_follow_torchs_generator(device):
    leaves = leaves_of(make((32, 64, 8, 4, 2), torch.float32), device)
    torch.manual_seed(3)
    first, second = (call("dropout_sum", leaves, dropout_p=0.5, rng=None)[0] for _ in range(2))
    torch.manual_seed(3)
    assert torch.equal(first, call("dropout_sum", leaves, dropout_p=0.5, rng=None)[0])
    assert not torch.equal(first, second)


BAD = {
    "A must have shape": {"A": torch.zeros(4, 9)},
    "B must be": {"B": torch.zeros(8, 4)},
    "A0 must have shape": {"A0": torch.zeros(2, 9), "B0": torch.zeros(8, 2)},
    "B0 must have shape": {"A0": torch.zeros(2, 10), "B0": torch.zeros(8, 3)},
    "both A0 and B0": {"A0": torch.zeros(2, 10)},
    "A0 must be frozen": {"A0": torch.zeros(2, 10, requires_grad=True), "B0": torch.zeros(8, 2)},
    "base_out must have shape": {"base_out": torch.zeros(12, 9)},
    "exactly one of": {"weight": torch.zeros(8, 10)},
    "must be frozen": {"weight": torch.zeros(8, 10, requires_grad=True), "base_out": None},
    "dropout_p must be in": {"dropout_p": 1.0},
    "site must be one of": {"site": "output"},
    'site "none" has no dropout': {"site": "none", "dropout_p": 0.5},
    "reduce must be": {"reduce": "max"},
    "rng must have shape": {"dropout_p": 0.5, "rng": torch.zeros(3, dtype=torch.int64)},
    "B is on meta": {"B": torch.zeros(3, 8, 4, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(device, message):
    arguments = {"x": torch.zeros(12, 10), "A": torch.zeros(4, 10), "B": torch.zeros(3, 8, 4)}
    arguments |= {"base_out": torch.zeros(12, 8)} | BAD[message]
    for name, a in arguments.items():
        arguments[name] = a.to(device) if isinstance(a, torch.Tensor) and not a.is_meta else a
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.dropout_sum(arguments.pop("x"), arguments.pop("A"), arguments.pop("B"), **arguments)
