"""routed_lora: forward and every gradient against the float64 reference."""

from functools import partial

import heads_cases
import pytest
import torch
from heads_cases import DTYPES, RNG, SHAPES, SITES, call, compare, leaves_of, make, results
from torch.library import opcheck

from align_ext import ops

FORMS = pytest.mark.parametrize("weight_form", [True, False], ids=["weight", "base_out"])
# site, p, own A, top_k: hydra, r_lora, hydra with a mask per head, lora_moe
ARCHITECTURES = {
    "shared mask": ("input", 0.3, False, None),
    "latent masks": ("latent", 0.3, False, None),
    "masks on x per head": ("input_per_head", 0.3, False, None),
    "own A, top k": ("input", 0.3, True, 2),
    "own A, latent masks": ("latent", 0.3, True, 1),
    "own A, masks on x per head": ("input_per_head", 0.3, True, None),
    "no dropout": ("none", 0.0, False, 2),
}
EVERY_ARCHITECTURE = pytest.mark.parametrize("architecture", ARCHITECTURES)
GROUPS = {96: 4, 45: 5, 24: 3, 129: 3, 1: 1, 8: 2, 712: 8}  # of an out_dim


def case(architecture, shape, dtype, groups=1, **options):
    """Inputs and the op's options."""
    inputs, options = cases(architecture, shape, dtype, groups, **options)
    return inputs(seed=0), options


def cases(architecture, shape, dtype, groups=1, **options):
    """Inputs of a seed and the op's options."""
    site, p, A_per_head, top_k = ARCHITECTURES[architecture]
    inputs = partial(make, shape, dtype, groups=groups, A_per_head=A_per_head, site=site, **options)
    return inputs, {"site": site, "dropout_p": p, "top_k": top_k and min(top_k, shape[-1]), "tau": 0.8}


def test_a_hand_computed_case(device):
    """Two groups of one output, two heads; the first token's logits are equal, the second's are far apart."""
    x = torch.tensor([[1.0, 0.0], [0.0, 200.0]], device=device, requires_grad=True)
    A = torch.tensor([[2.0, 1.0]], device=device, requires_grad=True)
    B = torch.tensor([[[1.0], [2.0]], [[3.0], [-2.0]]], device=device, requires_grad=True)
    R = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 1.0]], device=device, requires_grad=True)
    base = torch.zeros(2, 2, device=device)
    y, z, w = ops.routed_lora(x, A, B, R, 0.5, site="none", base_out=base)
    assert z.tolist() == [[2.0], [200.0]]
    assert w.tolist() == [[[0.5, 0.5], [0.5, 0.5]], [[1.0, 0.0], [0.0, 1.0]]]
    assert y.tolist() == [[2.0, 0.0], [100.0, -200.0]]  # 0.5 z Σ w B
    y.backward(torch.tensor([[1.0, 1.0], [1.0, 0.0]], device=device))
    # dz = 0.5 Σ_k dy_k Σ_i w_ki B_ik = 0.5 (2 + 0), 0.5 * 1;  dw = 0.5 z dy_k B_ik = [[1, 3], [2, -2]], ...
    # dlogit of token 0 = [[-0.5, 0.5], [1, -1]], of token 1 zero, where w is 0 or 1
    assert A.grad.tolist() == [[1.0, 100.0]]
    assert B.grad.tolist() == [[[100.5], [0.5]], [[0.5], [0.5]]]
    assert R.grad.tolist() == [[-0.5, 0.0], [0.5, 0.0], [1.0, 0.0], [-1.0, 0.0]]
    assert x.grad.tolist() == [[2.0, -0.5], [1.0, 0.5]]  # dz A + dlogit R: token 0 (2, 1) + (0, -0.5 - 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@EVERY_ARCHITECTURE
@FORMS
def test_forward_and_every_gradient_match_the_reference(device, dtype, shape, architecture, weight_form):
    groups = GROUPS[shape[2]] if weight_form else 1  # where the base's outputs come from is the same to every group
    inputs, options = cases(architecture, shape, dtype, groups)
    compare("routed_lora", device, inputs, weight_form=weight_form, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_ARCHITECTURE
def test_every_output_may_have_a_group_of_its_own(device, dtype, architecture):
    inputs, options = cases(architecture, (20, 33, 12, 6, 3), dtype, 12)
    compare("routed_lora", device, inputs, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_ARCHITECTURE
def test_the_offset_path_matches_the_reference(device, dtype, architecture):
    for groups in (1, 5):
        inputs, options = cases(architecture, (65, 67, 45, 5, 4), dtype, groups, offset_rank=3)
        compare("routed_lora", device, inputs, **options)


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture", ["latent masks", "own A, top k"])
def test_many_tiles_in_every_direction_are_right(device, dtype, architecture):
    inputs, options = cases(architecture, (257, 520, 712, 12, 4), dtype, 8, offset_rank=12)
    compare("routed_lora", device, inputs, weight_form=False, **options)


@pytest.mark.needs("size")
@pytest.mark.parametrize(
    ("architecture", "shape"), [("latent masks", (16, 32, 4096, 16, 1)), ("own A, latent masks", (16, 64, 64, 16, 16))]
)
def test_long_sums_round_no_more_than_torchs(device, architecture, shape):
    """Of 4,096 outputs, and of the ranks of 16 heads side by side."""
    inputs, options = cases(architecture, shape, torch.float32)
    compare("routed_lora", device, inputs, draws=2, weight_form=False, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_16_bit_input(device, dtype):
    inputs, options = cases("shared mask", (40, 72, 56, 8, 3), dtype, 2, adapters=torch.float32)
    actual = compare("routed_lora", device, inputs, **options)
    assert actual["dA"].dtype == actual["dB[0]"].dtype == actual["dR"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_ARCHITECTURE
def test_the_low_rank_term_alone_is_right(device, dtype, architecture):
    """With W = 0 nothing of the base can hide an error of the low-rank term."""
    inputs, options = cases(architecture, (50, 90, 70, 9, 3), dtype, 7, base=0)
    compare("routed_lora", device, inputs, **options)


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_any_number_of_heads_may_be_chosen(device, top_k):
    inputs, options = cases("own A, top k", (33, 40, 30, 6, 4), torch.float32, 3)
    w = compare("routed_lora", device, inputs, **options | {"top_k": top_k})["w"]
    assert ((w > 0).sum(-1) == top_k).all()
    torch.testing.assert_close(w.sum(-1), torch.ones(33, 3))


def test_ties_go_to_the_lowest_head(device):
    inputs, options = case("own A, top k", (5, 8, 6, 2, 4), torch.float32)
    inputs["R"] = torch.zeros_like(inputs["R"])
    w = results("routed_lora", inputs, device, **options)["w"]
    assert w.tolist() == [[[0.5, 0.5, 0.0, 0.0]]] * 5


@EVERY_ARCHITECTURE
def test_strided_views_and_leading_dimensions(device, architecture):
    inputs, options = case(architecture, (24, 40, 32, 6, 3), torch.float32, 2, offset_rank=2)
    leaves = leaves_of(inputs, device)
    plain = call("routed_lora", leaves, **options)
    wide = torch.randn(2, 12, 80, device=device)
    wide[..., ::2] = leaves["x"].detach().view(2, 12, 40)
    leaves |= {"x": wide[..., ::2], "R": leaves["R"].T.contiguous().T, "B": leaves["B"].mT.contiguous().mT}
    assert not any(leaves[name].is_contiguous() for name in ("x", "R", "B"))
    y, z, w = call("routed_lora", leaves, **options)
    assert y.shape == (2, 12, 32)
    for a, b in zip((y.reshape(24, 32), z, w), plain, strict=True):
        assert torch.equal(a, b)


@pytest.mark.needs("float64")
@EVERY_ARCHITECTURE
@FORMS
def test_gradcheck_of_y_z_and_w_together(architecture, weight_form):
    inputs, options = case(architecture, (6, 5, 4, 3, 3), torch.float64, 2, offset_rank=2)
    leaves = leaves_of(inputs)
    names = ("x", "A", "B", "R") if weight_form else ("x", "A", "B", "R", "base")

    def function(*tensors):
        replaced = leaves | dict(zip(names, tensors, strict=True))
        return call("routed_lora", replaced, weight_form=weight_form, **options)

    assert torch.autograd.gradcheck(function, [leaves[name] for name in names])


@FORMS
@EVERY_ARCHITECTURE
def test_opcheck(device, weight_form, architecture):
    inputs, options = case(architecture, (12, 10, 8, 4, 3), torch.float32, 2, offset_rank=2)
    leaves = leaves_of(inputs, device)
    x, A, B, R, A0, B0 = (leaves[name] for name in ("x", "A", "B", "R", "A0", "B0"))
    p, number, k = options["dropout_p"], SITES.index(options["site"]), options["top_k"] or 3
    rng = RNG.to(device) if p else None
    weight, bias, base = (leaves["W"], leaves["bias"], None) if weight_form else (None, None, leaves["base"])
    args = (x, A, B, R, 0.5, -1.5, A0, B0, k, 0.7, number, p, rng, weight, bias, base)
    opcheck(torch.ops.align_ext.routed_lora.default, args)
    y, z, w = (t.detach() for t in torch.ops.align_ext.routed_lora(*args))
    x, A, B, R = (t.detach() for t in (x, A, B, R))
    backward = (y, z, w, x, z, w, A, B, R, 0.5, -1.5, A0, B0, 0.7, number, p, rng, weight, True)
    opcheck(torch.ops.align_ext.routed_lora_backward.default, backward)


@EVERY_ARCHITECTURE
def test_compiles_without_a_graph_break(device, architecture):
    inputs, options = case(architecture, (16, 12, 10, 4, 3), torch.float32, 2)
    leaves, names = leaves_of(inputs, device), ("x", "A", "B", "R")

    def loss(*tensors):
        y, z, w = call("routed_lora", leaves | dict(zip(names, tensors, strict=True)), **options)
        return (y * leaves["dy"]).sum() + z.square().sum() + w.square().sum()

    trained = [leaves[name] for name in names]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(heads_cases.gradients(compiled, trained), heads_cases.gradients(loss, trained), strict=True):
        assert torch.equal(a, b)


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_ARCHITECTURE
def test_the_same_bits_twice_and_for_any_number_of_threads(device, dtype, architecture):
    inputs, options = case(architecture, (301, 130, 70, 8, 3), dtype, 2, offset_rank=4)
    heads_cases.same_bits_for_any_number_of_threads(
        lambda: results("routed_lora", inputs, device, weight_form=False, **options)
    )


def test_permuting_the_heads_permutes_their_gradients(device):
    inputs, options = case("own A, top k", (30, 40, 24, 8, 4), torch.float32)
    order = [2, 0, 3, 1]
    plain = results("routed_lora", inputs, device, **options)
    permuted = {name: inputs[name][order] for name in ("A", "B", "R")}
    permuted |= {"dz": inputs["dz"][:, order], "dw": inputs["dw"][:, :, order]}
    actual = results("routed_lora", inputs | permuted, device, **options)
    for place, head in enumerate(order):
        torch.testing.assert_close(actual[f"dB[{place}]"], plain[f"dB[{head}]"])
    for name in ("dA", "dR"):
        torch.testing.assert_close(actual[name], plain[name][order])
    for name in ("y", "dx"):
        torch.testing.assert_close(actual[name], plain[name])


@pytest.mark.parametrize("groups", [1, 3])
def test_a_router_of_zeros_takes_the_mean_of_the_heads(device, groups):
    inputs, options = case("latent masks", (30, 40, 24, 8, 4), torch.float32, groups)
    inputs["R"] = torch.zeros_like(inputs["R"])
    y, z, w = call("routed_lora", leaves_of(inputs, device), **options)
    for unused in ("R", "dw"):
        inputs.pop(unused)
    mean = call("dropout_sum", leaves_of(inputs, device), reduce="mean", site="latent", dropout_p=0.3)
    torch.testing.assert_close((y, z), mean)
    assert (w == 0.25).all()


def test_with_one_head_it_is_dropout_sum(device):
    inputs, options = case("latent masks", (30, 40, 24, 8, 1), torch.float32, 2)
    y, _, w = call("routed_lora", leaves_of(inputs, device), **options)
    for unused in ("R", "dw"):
        inputs.pop(unused)
    torch.testing.assert_close(y, call("dropout_sum", leaves_of(inputs, device), dropout_p=0.3)[0])
    assert (w == 1).all()


def test_a_loss_on_the_weights_alone_reaches_the_router(device):
    inputs, options = case("own A, top k", (20, 16, 12, 4, 3), torch.float32, 2)
    inputs["dy"], inputs["dz"] = torch.zeros_like(inputs["dy"]), torch.zeros_like(inputs["dz"])
    leaves = leaves_of(inputs, device)
    call("routed_lora", leaves, **options)[2].square().sum().backward()
    assert leaves["R"].grad.abs().sum() > 0
    assert leaves["A"].grad.abs().sum() == leaves["B"].grad.abs().sum() == 0


@EVERY_ARCHITECTURE
def test_nothing_but_x_z_w_and_the_generators_state_is_saved(device, architecture):
    inputs, options = case(architecture, (64, 128, 96, 8, 3), torch.float32, 4)
    leaves = leaves_of(inputs, device)
    saved = heads_cases.bytes_saved(lambda: call("routed_lora", leaves, **options))
    for name in ("x", "A", "B", "R", "W"):
        saved.pop(leaves[name].untyped_storage().data_ptr())
    z = 8 * (1 if inputs["dz"].dim() == 2 else 3)
    assert sum(saved.values()) <= 4 * 64 * (z + 4 * 3) + 16


def test_inputs_are_not_modified(device):
    inputs, options = case("own A, top k", (12, 10, 8, 4, 2), torch.float32, 2, offset_rank=2)
    leaves = leaves_of(inputs, device)
    outputs = call("routed_lora", leaves, weight_form=False, **options)
    torch.autograd.backward(outputs, [leaves[name] for name in ("dy", "dz", "dw")])
    assert all(torch.equal(leaves[name].cpu(), tensor) for name, tensor in inputs.items())


BAD = {
    "A must have shape": {"A": torch.zeros(2, 4, 10)},
    "B must be": {"B": torch.zeros(8, 4)},
    "R must be": {"R": torch.zeros(4, 10)},
    "which must divide out_dim 8": {"R": torch.zeros(9, 10)},
    "top_k must be in 1 .. 3, got 4": {"top_k": 4},
    "top_k must be in 1 .. 3, got 0": {"top_k": 0},
    "tau must be positive": {"tau": 0.0},
    "both A0 and B0": {"A0": torch.zeros(2, 10)},
    "B0 must have shape": {"A0": torch.zeros(2, 10), "B0": torch.zeros(8, 3)},
    "base_out must have shape": {"base_out": torch.zeros(12, 9)},
    "exactly one of": {"weight": torch.zeros(8, 10)},
    "site must be one of": {"site": "output"},
    "R is on meta": {"R": torch.zeros(3, 10, device="meta")},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments_are_named(device, message):
    arguments = {"A": torch.zeros(4, 10), "B": torch.zeros(3, 8, 4), "R": torch.zeros(3, 10)}
    arguments |= {"base_out": torch.zeros(12, 8)} | BAD[message]
    for name, a in arguments.items():
        arguments[name] = a.to(device) if isinstance(a, torch.Tensor) and not a.is_meta else a
    tensors = [arguments.pop(name) for name in ("A", "B", "R")]
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.routed_lora(torch.zeros(12, 10, device=device), *tensors, **arguments)
