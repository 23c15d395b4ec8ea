"""sibling_lora of layers with heads, routers and offsets: as the float64 reference, and as the layers one by one."""

from functools import partial

import pytest
import torch
from closeness import assert_draws_are_as_close_as_torch
from heads_cases import DTYPES, RNG
from torch.library import opcheck

from align_ext import ops, reference

SCALING = [0.75, 0.5, 1.5]
# heads, site, p, own A, offset, router, options
KINDS = {
    "m_lora": (3, "latent", 0.3, False, True, False, {"reduce": "mean"}),
    "lora with an offset": (None, "input", 0.3, False, True, False, {}),
    "hydra": (3, "input", 0.3, False, True, True, {"tau": 0.8}),
    "r_lora": (2, "latent", 0.3, False, True, True, {}),
    "lora_moe": (3, "input", 0.3, True, False, True, {"top_k": 2}),
    "own A, latent masks": (2, "latent", 0.3, True, False, True, {}),
    "no dropout": (3, "none", 0.0, False, True, True, {}),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
# tokens, in, outs, ranks: even, odd, one alone, several chunks of ranks, degenerate
SHAPES = [
    (64, 128, (96, 32, 32), (8, 8, 8)),
    (65, 67, (45, 129), (5, 3)),
    (33, 31, (12,), (17,)),
    (40, 72, (24, 40, 56), (3, 20, 9)),
    (7, 1, (1, 2), (1, 1)),
    (0, 16, (8, 8), (4, 4)),
]
NAMES = ("A", "B", "R", "A0", "B0", "weight", "bias")


def make(kind, tokens, n, outs, ranks, dtype, adapter_dtype=None, seed=0):
    """x, the lists of all layers by name, and the gradients of y, z and w; routers have groups where outs allow it."""
    heads, _, _, own, offset, routed, _ = KINDS[kind]
    g = torch.Generator().manual_seed(seed)
    layers, N = list(zip(outs, ranks, strict=True)), heads or 1
    groups = [next(count for count in (4, 3, 1) if m % count == 0) for m in outs]

    def normal(*shape, scale=1.0, of=adapter_dtype or dtype):
        return (torch.randn(shape, generator=g) * scale).to(of)

    lists = {
        "A": [normal(*(N,) * own, r, n, scale=n**-0.5) for _, r in layers],
        "B": [normal(*(N,) * (heads is not None), m, r, scale=(N * r) ** -0.5) for m, r in layers],
        "R": [normal(k * N, n, scale=n**-0.5) for k in groups if routed],
        "A0": [normal(r, n, scale=n**-0.5) for _, r in layers if offset],
        "B0": [normal(m, r, scale=r**-0.5) for m, r in layers if offset],
        "weight": [normal(m, n, scale=n**-0.5, of=dtype) for m in outs],
        "bias": [normal(m, of=dtype) for m in outs],
    }
    wide = torch.float32
    gradients = [normal(tokens, m, of=wide) for m in outs]
    gradients += [normal(tokens, *(N,) * own, r, of=wide) for _, r in layers]
    gradients += [normal(tokens, k, N, of=wide) for k in groups if routed]
    return normal(tokens, n, of=dtype), lists, gradients


def options_of(kind):
    _, site, p, _, _, _, options = KINDS[kind]
    return {"site": site, "dropout_p": p} | options


def run(op, kind, inputs, dtype=None, device="cpu"):
    """Outputs and gradients of one op in one dtype."""
    x, lists, d_outputs = inputs
    to = dtype or x.dtype
    lists = {name: [t.to(device) for t in tensors] for name, tensors in lists.items()}
    if dtype is not None:  # the reference on the very same inputs: adapters rounded as the op rounds them
        lists = {name: [t.to(x.dtype).to(dtype) for t in tensors] for name, tensors in lists.items()}
    x = x.to(device, to).detach().clone().requires_grad_()
    trained = {name: [t.detach().clone().requires_grad_() for t in lists[name]] for name in ("A", "B", "R")}
    rng = RNG.to(device) if options_of(kind)["dropout_p"] else None
    outputs = op(x, **lists | trained, scaling=SCALING[: len(lists["A"])], rng=rng, **options_of(kind))
    flat = [t for of_layers in outputs for t in of_layers]
    torch.autograd.backward(flat, [d.to(o.device, o.dtype) for o, d in zip(flat, d_outputs, strict=True)])
    results = {"dx": x.grad} | {f"output {i}": t for i, t in enumerate(flat)}
    results |= {f"d{name}{i}": t.grad for name, tensors in trained.items() for i, t in enumerate(tensors)}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def compare(kind, device, inputs):
    def draw(seed):
        drawn = inputs(seed=seed)
        same, exact = (run(reference.sibling_lora, kind, drawn, dtype) for dtype in (drawn[0].dtype, torch.float64))
        return run(ops.sibling_lora, kind, drawn, device=device), same, exact

    return assert_draws_are_as_close_as_torch(draw)


def test_a_hand_computed_case(device):
    """Two layers of two heads each; in the first one the second head has all the weight."""

    def leaf(values):
        return torch.tensor(values, device=device, requires_grad=True)

    x, W = leaf([[1.0, 200.0]]), torch.zeros(1, 2, device=device)
    A, R = [leaf([[2.0, 0.0]]), leaf([[0.0, 0.01]])], [leaf([[0.0, 0.0], [0.0, 1.0]]), leaf([[0.0, 0.0], [0.0, 0.0]])]
    B = [leaf([[[1.0]], [[3.0]]]), leaf([[[5.0]], [[1.0]]])]
    (y0, y1), (z0, z1), (w0, w1) = ops.sibling_lora(x, A, B, [0.5, 1.0], R=R, site="none", weight=[W, W])
    assert (z0.tolist(), z1.tolist()) == ([[2.0]], [[2.0]])
    assert (w0.tolist(), w1.tolist()) == ([[[0.0, 1.0]]], [[[0.5, 0.5]]])
    assert (y0.tolist(), y1.tolist()) == ([[3.0]], [[6.0]])  # 0.5 * 3 * 2;  (5 + 1) / 2 * 2
    (y0 + y1).sum().backward()
    # dz = 1.5, 3;  dw of the second layer = z B = 10, 2, so that dlogit = 2, -2
    assert [a.grad.tolist() for a in A] == [[[1.5, 300.0]], [[3.0, 600.0]]]
    assert [b.grad.tolist() for b in B] == [[[[0.0]], [[1.0]]], [[[1.0]], [[1.0]]]]
    assert [r.grad.tolist() for r in R] == [[[0.0, 0.0], [0.0, 0.0]], [[2.0, 400.0], [-2.0, -400.0]]]
    torch.testing.assert_close(x.grad, x.new_tensor([[3.0, 0.03]]))  # 1.5 * 2;  3 * 0.01


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@EVERY_KIND
def test_forward_and_every_gradient_match_the_reference(device, dtype, shape, kind):
    compare(kind, device, partial(make, kind, *shape, dtype))


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", [torch.float32, *(pytest.param(t, marks=pytest.mark.slow) for t in DTYPES[1:])])
@EVERY_KIND
def test_many_rows_and_columns_are_right(device, dtype, kind):
    compare(kind, device, partial(make, kind, 2100, 520, (312, 136, 144), (8, 8, 8), dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@EVERY_KIND
def test_float32_adapters_on_a_16_bit_input(device, dtype, kind):
    actual = compare(kind, device, partial(make, kind, 40, 72, (56, 24), (8, 8), dtype, torch.float32))
    assert actual["dA1"].dtype == torch.float32


@pytest.mark.parametrize("kind", ["m_lora", "hydra", "lora_moe"])
def test_one_layer_is_what_its_own_operator_makes_of_it(device, kind):
    """Its masks too: those of one layer follow no others."""
    x, lists, _ = make(kind, 70, 136, (40,), (8,), torch.float32)
    x, lists = x.to(device), {name: [t.to(device) for t in tensors] for name, tensors in lists.items()}
    together = ops.sibling_lora(x, **lists, scaling=[0.5], rng=RNG.to(device), **options_of(kind))
    own = {name: tensors[0] for name, tensors in lists.items() if tensors}
    op = ops.routed_lora if lists["R"] else ops.dropout_sum
    alone = op(x, **own, scaling=0.5, rng=RNG.to(device), **options_of(kind))
    for (of_layers,), tensor in zip((outputs for outputs in together if outputs), alone, strict=True):
        torch.testing.assert_close(of_layers, tensor)


def test_the_masks_on_latents_of_different_widths_follow_one_another(device):
    ranks, tokens = (3, 5), 70
    lists = {
        "A": [torch.ones(r, 1, device=device) for r in ranks],
        "B": [torch.eye(r, device=device).expand(2, r, r).clone() for r in ranks],
        "weight": [torch.zeros(r, 1, device=device) for r in ranks],
    }
    x, rng = torch.ones(tokens, 1, device=device), RNG.to(device)
    y, *_ = ops.sibling_lora(x, **lists, scaling=[1.0, 1.0], site="latent", dropout_p=0.5, rng=rng)
    masks = reference.philox.dropout_mask(RNG, 0.5, (tokens, 2 * sum(ranks)), torch.float32).split([6, 10], 1)
    for of_layer, mask, r in zip(y, masks, ranks, strict=True):
        assert torch.equal(of_layer.cpu(), mask.unflatten(1, (2, r)).sum(1))


def test_a_layer_that_the_loss_does_not_reach_has_no_gradient(device):
    x, lists, _ = make("r_lora", 12, 24, (16, 8), (4, 4), torch.float32)
    lists = {name: [t.to(device) for t in tensors] for name, tensors in lists.items()}
    trained = [t.requires_grad_() for name in ("A", "B", "R") for t in lists[name]]
    _, _, w = ops.sibling_lora(x.to(device), **lists, scaling=[1.0, 1.0], site="latent")
    w[1].square().sum().backward()
    assert [t.grad is None for t in trained] == 3 * [True, False]
    assert trained[5].grad.abs().sum() > 0


@pytest.mark.needs("float64")
@EVERY_KIND
def test_gradcheck_of_all_outputs_together(kind):
    x, lists, _ = make(kind, 5, 6, (4, 3), (2, 3), torch.float64)
    names = [(name, i) for name in ("A", "B", "R") for i in range(len(lists[name]))]
    leaves = [x.requires_grad_(), *(lists[name][i].requires_grad_() for name, i in names)]
    options = options_of(kind) | {"top_k": None} if "top_k" in options_of(kind) else options_of(kind)

    def call(x, *trained):
        given = {name: list(tensors) for name, tensors in lists.items()}
        for (name, i), tensor in zip(names, trained, strict=True):
            given[name][i] = tensor
        return tuple(t for of in ops.sibling_lora(x, **given, scaling=[0.5, 2.0], rng=RNG, **options) for t in of)

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("kind", ["m_lora", "hydra", pytest.param("lora_moe", marks=pytest.mark.slow)])
def test_opcheck(device, kind):
    x, lists, _ = make(kind, 12, 10, (8, 6), (4, 3), torch.float32)
    x, (A, B, R, A0, B0, W, bias) = x.to(device), ([t.to(device) for t in lists[name]] for name in NAMES)
    for t in (x, *A, *B, *R):
        t.requires_grad_()
    site = ("none", "input", "latent").index(options_of(kind)["site"])
    p = options_of(kind)["dropout_p"]
    rng, adapters, scalings = RNG.to(device) if p else None, (A, B, R), ([0.5, 1.0], [-0.5, -1.0])
    args = (x, *adapters, *scalings, A0, B0, 1, 0.8, site, p, rng, W, bias)
    opcheck(torch.ops.align_ext.sibling_lora.default, args)
    y, z, w = ([t.detach() for t in tensors] for tensors in torch.ops.align_ext.sibling_lora(*args))
    x, adapters = x.detach(), tuple([t.detach() for t in tensors] for tensors in adapters)
    for dz, dw in ((z, w), ([], [])):
        backward = (y, dz, dw, x, z, w, *adapters, *scalings, A0, B0, 0.8, site, p, rng, W, True)
        opcheck(torch.ops.align_ext.sibling_lora_backward.default, backward)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["m_lora", "hydra"])
def test_the_same_bits_twice(device, dtype, kind):
    inputs = make(kind, 300, 136, (72, 40, 24), (8, 8, 8), dtype)
    first, second = (run(ops.sibling_lora, kind, inputs, device=device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_contradicts_is_refused(device):
    x, lists, _ = make("r_lora", 4, 6, (8, 6), (4, 3), torch.float32)
    x, lists = x.to(device), {name: [t.to(device) for t in tensors] for name, tensors in lists.items()}
    call = partial(ops.sibling_lora, x, scaling=[1.0, 1.0])
    with pytest.raises(ValueError, match=r"R, A0 and B0 if given, .* 2, 2, 2, 2, 2, 1, 2 and 2"):
        call(**lists | {"R": lists["R"][:1]})
    with pytest.raises(ValueError, match='reduce must be "sum" or "mean"'):
        call(**lists, reduce="max")
    with pytest.raises(RuntimeError, match="site must be none, input or latent"):
        call(**lists, site="input_per_head")
    with pytest.raises(RuntimeError, match="B of every layer must have the 2 heads of the first one, got 1"):
        call(**lists | {"B": [lists["B"][0], lists["B"][1][:1]]})
    with pytest.raises(ValueError, match="A0 must be frozen"):
        call(**lists | {"A0": [lists["A0"][0], lists["A0"][1].clone().requires_grad_()]})
    with pytest.raises(RuntimeError, match="R must be"):
        call(**lists | {"R": [lists["R"][0], lists["R"][1][:1]]})
