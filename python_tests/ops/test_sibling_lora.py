"""sibling_lora: forward and every gradient against the float64 reference, and against the layers one by one."""

from functools import partial

import pytest
import torch
from closeness import assert_draws_are_as_close_as_torch
from torch.library import opcheck

from align_ext import ops, reference

RNG = torch.tensor([123456789, 42])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALING = [0.75, 0.5, 1.5]
# tokens, in, outs, ranks: q, k and v, gate and up, one alone, odd, several splits and chunks of ranks, degenerate
SHAPES = [
    (64, 128, (96, 32, 32), (8, 8, 8)),
    (65, 67, (45, 129), (5, 5)),
    (33, 31, (12,), (17,)),
    (40, 72, (24, 40, 56), (3, 20, 9)),
    (9, 200, (24, 8, 40), (70, 3, 33)),
    (7, 1, (1, 2), (1, 1)),
    (0, 16, (8, 8), (4, 4)),
]


def make(tokens, n, outs, ranks, dtype, adapter_dtype=None, seed=0):
    """Inputs whose low-rank terms are as large as the bases; the second layer has no bias."""
    g = torch.Generator().manual_seed(seed)
    layers = list(zip(outs, ranks, strict=True))
    adapter_dtype = adapter_dtype or dtype
    A = [(torch.randn(r, n, generator=g) / n**0.5).to(adapter_dtype) for _, r in layers]
    B = [(torch.randn(m, r, generator=g) / r**0.5).to(adapter_dtype) for m, r in layers]
    W = [(torch.randn(m, n, generator=g) / n**0.5).to(dtype) for m, _ in layers]
    bias = [torch.randn(m, generator=g).to(dtype) for m, _ in layers]
    dy = [torch.randn(tokens, m, generator=g) for m, _ in layers]
    dz = [torch.randn(tokens, r, generator=g) for _, r in layers]
    return torch.randn(tokens, n, generator=g).to(dtype), A, B, W, bias, dy, dz


def run(op, inputs, dtype, *, p, with_dz=True, device="cpu"):
    """y, z and the gradients of x, A, B of one op in one dtype."""
    x, *lists = inputs
    A, B, W, bias, dy, dz = ([t.to(device) for t in tensors] for tensors in lists)
    x = x.to(device)
    if dtype is not None:  # the reference in float64 on the very same inputs: adapters rounded as the op rounds them
        A, B = ([t.to(x.dtype).to(dtype) for t in tensors] for tensors in (A, B))
        x, (W, bias) = x.to(dtype), ([t.to(dtype) for t in tensors] for tensors in (W, bias))
    x = x.detach().clone().requires_grad_()
    A, B = ([t.detach().clone().requires_grad_() for t in tensors] for tensors in (A, B))
    biases = [None if i == 1 else b for i, b in enumerate(bias)]
    rng = RNG.to(device) if p else None
    y, z, _ = op(x, A, B, SCALING[: len(A)], dropout_p=p, rng=rng, weight=W, bias=biases)
    outputs = [*y, *z] if with_dz else y
    torch.autograd.backward(outputs, [d.to(o.dtype) for o, d in zip(outputs, [*dy, *dz][: len(outputs)], strict=True)])
    results = {"dx": x.grad}
    for i in range(len(A)):
        results |= {f"y{i}": y[i], f"z{i}": z[i], f"dA{i}": A[i].grad, f"dB{i}": B[i].grad}
    return {name: tensor.detach().cpu() for name, tensor in results.items()}


def compare(device, inputs, **options):
    """Holds the op to the tolerance rule on inputs(seed)."""

    def draw(seed):
        drawn = inputs(seed=seed)
        same, exact = (run(reference.sibling_lora, drawn, t, **options) for t in (drawn[0].dtype, torch.float64))
        return run(ops.sibling_lora, drawn, None, device=device, **options), same, exact

    return assert_draws_are_as_close_as_torch(draw)


def test_a_hand_computed_case(device):
    def leaf(values):
        return torch.tensor(values, device=device, requires_grad=True)

    x, zeros = leaf([[1.0, 2.0], [3.0, -1.0]]), torch.zeros(1, 2, device=device)
    A, B = [leaf([[1.0, 1.0]]), leaf([[0.0, 2.0]])], [leaf([[2.0]]), leaf([[-1.0]])]
    (y0, y1), (z0, z1), _ = ops.sibling_lora(x, A, B, [0.5, 1.0], weight=[zeros, zeros + 1])
    assert (z0.tolist(), z1.tolist()) == ([[3.0], [2.0]], [[4.0], [-2.0]])
    assert (y0.tolist(), y1.tolist()) == ([[3.0], [2.0]], [[-1.0], [4.0]])  # 0 + B z / 2;  x summed - z
    torch.autograd.backward([y0, y1], [torch.ones_like(y0), torch.tensor([[0.0], [1.0]], device=device)])
    # dz0 = [1, 1], dz1 = [0, -1];  dA = dzᵀ x;  dB = s dyᵀ z;  dx = dy1 W1 + dz0 A0 + dz1 A1
    assert (A[0].grad.tolist(), A[1].grad.tolist()) == ([[4.0, 1.0]], [[-3.0, 1.0]])
    assert (B[0].grad.tolist(), B[1].grad.tolist()) == ([[2.5]], [[-2.0]])
    assert x.grad.tolist() == [[1.0, 1.0], [2.0, 0.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_forward_and_every_gradient_match_the_reference(device, dtype, shape, p):
    compare(device, partial(make, *shape, dtype), p=p)


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles_in_every_direction_are_right(device, dtype):
    compare(device, partial(make, 2100, 1032, (712, 256, 264), (12, 12, 12), dtype), p=0.1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_adapters_on_a_16_bit_input(device, dtype):
    actual = compare(device, partial(make, 40, 72, (56, 24), (8, 8), dtype, torch.float32), p=0.1)
    assert actual["dA1"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_layer_is_what_grouped_lora_makes_of_it(device, dtype):
    x, A, B, W, *_ = make(70, 136, (40, 24, 72), (8, 8, 8), dtype)
    x, (A, B, W) = x.to(device), ([t.to(device) for t in tensors] for tensors in (A, B, W))
    y, z, _ = ops.sibling_lora(x, A, B, SCALING, weight=W)
    for i in range(3):
        one_y, one_z = ops.grouped_lora(x, A[i], B[i], SCALING[i], weight=W[i])
        torch.testing.assert_close(z[i], one_z)
        torch.testing.assert_close(y[i], one_y)


def test_a_layer_that_the_loss_does_not_reach_has_no_gradient(device):
    x, A, B, W, *_ = make(12, 24, (16, 8, 8), (4, 4, 4), torch.float32)
    x, (A, B, W) = x.to(device).requires_grad_(), ([t.to(device) for t in tensors] for tensors in (A, B, W))
    for adapter in [*A, *B]:
        adapter.requires_grad_()
    y, z, _ = ops.sibling_lora(x, A, B, SCALING, weight=W)
    (y[0].sum() + z[2].sum()).backward()
    assert [adapter.grad is None for adapter in [*A, *B]] == [False, True, False, False, True, False]
    assert torch.equal(B[2].grad, torch.zeros_like(B[2]))  # dy is zero, z alone is reached
    one_x = x.detach().clone().requires_grad_()
    (ops.grouped_lora(one_x, A[0], B[0], SCALING[0], weight=W[0])[0].sum() + (one_x @ A[2].T).sum()).backward()
    torch.testing.assert_close(x.grad, one_x.grad)


def test_x_may_need_no_gradient(device):
    x, A, B, W, *_ = make(12, 24, (16, 8), (4, 4), torch.float32)
    x, (A, B, W) = x.to(device), ([t.to(device) for t in tensors] for tensors in (A, B, W))
    grads = []
    for needed in (True, False):
        leaves = [t.detach().clone().requires_grad_() for t in (*A, *B)]
        y, *_ = ops.sibling_lora(x.clone().requires_grad_(needed), leaves[:2], leaves[2:], [1.0, 1.0], weight=W)
        (y[0].sum() * 2 + y[1].square().sum()).backward()
        grads.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("columns", [64, 61])
def test_the_masks_of_a_token_follow_one_another(device, columns):
    x, zero = torch.ones(70, columns, device=device), torch.zeros(8, columns, device=device)
    eye, out = torch.eye(columns, device=device), torch.zeros(8, columns, device=device)
    rng = RNG.to(device)
    _, z, _ = ops.sibling_lora(x, [eye, eye], [out, out], [1.0, 1.0], dropout_p=0.5, rng=rng, weight=[zero, zero])
    masks = reference.philox.dropout_mask(RNG, 0.5, (70, 2, columns), torch.float32)
    assert all(torch.equal(z[i].cpu(), masks[:, i]) for i in range(2))


@pytest.mark.needs("float64")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_of_all_outputs_together(p):
    x, A, B, W, bias, *_ = make(6, 5, (4, 3, 2), (3, 2, 1), torch.float64)
    leaves = [t.requires_grad_() for t in (x, *A, *B)]

    def call(x, *adapters):
        y, z, _ = ops.sibling_lora(x, adapters[:3], adapters[3:], SCALING, dropout_p=p, rng=RNG, weight=W, bias=bias)
        return *y, *z

    assert torch.autograd.gradcheck(call, leaves)


@pytest.mark.parametrize("p", [0.0, 0.2])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(device, p, with_bias):
    x, A, B, W, bias, *_ = make(12, 10, (8, 6), (4, 3), torch.float32)
    x, (A, B, W, bias) = x.to(device), ([t.to(device) for t in tensors] for tensors in (A, B, W, bias))
    rng = RNG.to(device) if p else None
    for t in (x, *A, *B):
        t.requires_grad_()
    scalings, none = ([0.5, 1.0], [-0.5, -1.0]), []
    args = (x, A, B, none, *scalings, none, none, 1, 1.0, 1, p, rng, W, bias if with_bias else none)
    opcheck(torch.ops.align_ext.sibling_lora.default, args)
    y, z, w = ([t.detach() for t in tensors] for tensors in torch.ops.align_ext.sibling_lora(*args))
    x, (A, B) = x.detach(), ([t.detach() for t in tensors] for tensors in (A, B))
    for dz in (z, []):
        backward = (y, dz, w, x, z, w, A, B, none, *scalings, none, none, 1.0, 1, p, rng, W, True)
        opcheck(torch.ops.align_ext.sibling_lora_backward.default, backward)


def test_compiles_without_a_graph_break(device):
    x, A, B, W, *_ = make(16, 12, (10, 6), (4, 4), torch.float32)
    x, (A, B, W) = x.to(device), ([t.to(device) for t in tensors] for tensors in (A, B, W))
    rng = RNG.to(device)

    def loss(x, *adapters):
        y, z, _ = ops.sibling_lora(x, adapters[:2], adapters[2:], [1.0, 0.5], dropout_p=0.2, rng=rng, weight=W)
        return sum(t.square().sum() for t in (*y, *z))

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.detach().clone().requires_grad_() for t in (x, *A, *B)]
        value = function(*leaves)
        value.backward()
        results.append([value.detach(), *(leaf.grad for leaf in leaves)])
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice(device, dtype):
    inputs = make(300, 136, (72, 40, 24), (8, 8, 8), dtype)
    first, second = (run(ops.sibling_lora, inputs, None, p=0.2, device=device) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_contradicts_is_refused(device):
    x, A, B, W, bias, *_ = make(4, 6, (8, 6), (4, 3), torch.float32)
    x, (A, B, W, bias) = x.to(device), ([t.to(device) for t in tensors] for tensors in (A, B, W, bias))
    with pytest.raises(ValueError, match="for each of 1 to 3 layers, got 2, 1, 2, 2, 2, 0, 0 and 0"):
        ops.sibling_lora(x, A, B[:1], [1.0, 1.0], weight=W)
    with pytest.raises(ValueError, match="got 4, 4, 4, 4, 4, 0, 0 and 0"):
        ops.sibling_lora(x, 2 * A, 2 * B, 4 * [1.0], weight=2 * W)
    with pytest.raises(ValueError, match="must be frozen"):
        ops.sibling_lora(x, A, B, [1.0, 1.0], weight=[W[0], W[1].clone().requires_grad_()])
    with pytest.raises(RuntimeError, match=r"weight must have shape \[6, 6\]"):
        ops.sibling_lora(x, A, B, [1.0, 1.0], weight=[W[0], W[0]])
    with pytest.raises(RuntimeError, match=r"A must have shape \[4, 6\], got \[1, 4, 6\]"):
        ops.sibling_lora(x, [a[None] for a in A], [b[None] for b in B], [1.0, 1.0], weight=W)
    with pytest.raises(RuntimeError, match="a row at least"):
        ops.sibling_lora(x, [A[0], A[1][:0]], [B[0], B[1][:, :0]], [1.0, 1.0], weight=W)
    y, *_ = ops.sibling_lora(x, [a.requires_grad_() for a in A], B, [1.0, 1.0], weight=W, bias=bias)
    with pytest.raises(RuntimeError, match="sibling_lora cannot be differentiated twice"):
        torch.autograd.grad(y[0].sum(), A[0], create_graph=True)
