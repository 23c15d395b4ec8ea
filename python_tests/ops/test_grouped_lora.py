"""grouped_lora: forward and every gradient against the float64 reference."""

import itertools
from functools import partial

import pytest
import torch
from closeness import assert_draws_are_as_close_as_torch
from torch.library import opcheck

from align_ext import _C, ops, reference

RNG = torch.tensor([123456789, 42])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMS = pytest.mark.parametrize("weight_form", [True, False], ids=["weight", "base_out"])
# tokens, in, out, rank, groups: ordinary, odd, degenerate
SHAPES = [
    (64, 128, 96, 8, 1),
    (65, 67, 45, 5, 3),
    (33, 31, 129, 17, 2),
    (9, 200, 24, 70, 1),
    (7, 1, 1, 1, 1),
    (0, 16, 8, 4, 1),
    (5, 24, 16, 4, 7),
]


def make(tokens, n, m, r, groups, dtype, adapter_dtype=None, seed=0, device="cpu", base_scale=1):
    """Inputs whose low-rank term is as large as the base: the tolerance must see it."""
    g = torch.Generator().manual_seed(seed)
    lead = (groups,) if groups > 1 else ()
    adapter_dtype = adapter_dtype or dtype
    x = torch.randn(tokens, n, generator=g).to(dtype)
    A = (torch.randn(*lead, r, n, generator=g) / n**0.5).to(adapter_dtype)
    B = (torch.randn(*lead, m, r, generator=g) / r**0.5).to(adapter_dtype)
    W = (base_scale * torch.randn(m, n, generator=g) / n**0.5).to(dtype)
    bias = (base_scale * torch.randn(m, generator=g)).to(dtype)
    base = torch.randn(tokens, m, generator=g).to(dtype)
    dy = torch.randn(tokens, m, generator=g)
    dz = torch.randn(tokens, r, generator=g)
    return tuple(t.to(device) for t in (x, A, B, W, bias, base, dy, dz))


def grouping(tokens, groups, kind):
    if groups == 1:
        return {}
    if kind == "group":
        return {"group": torch.arange(tokens) * 5 % groups}
    cuts = torch.linspace(0, tokens, groups).round().long()
    return {"offsets": torch.cat([cuts[:1], cuts])}  # the first group is empty


def run(op, inputs, dtype, *, weight_form, p, kind, groups, scaling=0.75, with_dz=True, device="cpu"):
    """y, z and the gradients of x, A, B (and base_out) of one op in one dtype."""
    x, A, B, W, bias, base, dy, dz = (t.to(device) for t in inputs)
    if dtype is not None:  # the reference in float64 on the very same inputs: adapters rounded as the op rounds them
        A, B = (t.to(x.dtype).to(dtype) for t in (A, B))
        x, W, bias, base = (t.to(dtype) for t in (x, W, bias, base))
    x, A, B, base = (t.detach().clone().requires_grad_() for t in (x, A, B, base))
    form = {"weight": W, "bias": bias} if weight_form else {"base_out": base}
    options = {name: t.to(device) for name, t in grouping(x.shape[0], groups, kind).items()}
    y, z = op(x, A, B, scaling, dropout_p=p, rng=RNG.to(device) if p else None, **options, **form)
    outputs, grads = ([y, z], [dy.to(y.dtype), dz.to(z.dtype)]) if with_dz else ([y], [dy.to(y.dtype)])
    torch.autograd.backward(outputs, grads)
    result = {"y": y, "z": z, "dx": x.grad, "dA": A.grad, "dB": B.grad}
    if not weight_form:
        result["dbase"] = base.grad
    return {name: tensor.detach().cpu() for name, tensor in result.items()}


def compare(device, inputs, **options):
    """Holds the op to the tolerance rule on inputs(seed)."""

    def draw(seed):
        drawn = inputs(seed=seed)
        dtypes = drawn[0].dtype, torch.float64
        same, exact = (run(reference.grouped_lora, drawn, dtype, **options) for dtype in dtypes)
        return run(ops.grouped_lora, drawn, None, device=device, **options), same, exact

    return assert_draws_are_as_close_as_torch(draw)


def test_a_hand_computed_case(device):
    x = torch.tensor([[1.0, 2.0], [3.0, -1.0]], device=device, requires_grad=True)
    A = torch.tensor([[1.0, 1.0]], device=device, requires_grad=True)
    B = torch.tensor([[2.0], [0.0], [-1.0]], device=device, requires_grad=True)
    base = torch.zeros(2, 3, device=device, requires_grad=True)
    y, z = ops.grouped_lora(x, A, B, 0.5, base_out=base)
    assert z.tolist() == [[3.0], [2.0]]
    assert y.tolist() == [[3.0, 0.0, -1.5], [2.0, 0.0, -1.0]]
    y.backward(torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]], device=device))
    # dz = 0.5 dy B = [1, -1];  dA = dzᵀ x;  dB = 0.5 dyᵀ z;  dx = dz A
    assert A.grad.tolist() == [[-2.0, 3.0]]
    assert B.grad.tolist() == [[1.5], [1.5], [2.0]]
    assert x.grad.tolist() == [[1.0, 1.0], [-1.0, -1.0]]
    assert base.grad.tolist() == [[1.0, 1.0, 0.0], [0.0, 0.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.0, 0.3])
@FORMS
def test_forward_and_every_gradient_match_the_reference(device, dtype, shape, p, weight_form):
    groups = shape[-1]
    for kind in ("group", "offsets") if groups > 1 else (None,):
        compare(device, partial(make, *shape, dtype), weight_form=weight_form, p=p, kind=kind, groups=groups)


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(515, 1032, 712, 12, 1), (300, 520, 1096, 70, 3)])
@FORMS
def test_many_tiles_in_every_direction_are_right(device, dtype, shape, weight_form):
    inputs = partial(make, *shape, dtype)
    compare(device, inputs, weight_form=weight_form, p=0.1, kind="group", groups=shape[-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@FORMS
def test_float32_adapters_on_a_16_bit_input(device, dtype, weight_form):
    inputs = partial(make, 40, 72, 56, 8, 1, dtype, torch.float32)
    actual = compare(device, inputs, weight_form=weight_form, p=0.1, kind=None, groups=1)
    assert actual["dA"].dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_low_rank_term_alone_is_right(device, dtype):
    """With W = 0 nothing of the base can hide an error of the low-rank term."""
    compare(device, partial(make, 50, 90, 70, 9, 1, dtype, base_scale=0), weight_form=True, p=0.2, kind=None, groups=1)


def test_strided_views_and_leading_dimensions(device):
    x, A, B, W, bias, *_ = make(24, 40, 32, 6, 1, torch.float32, device=device)
    wide = torch.randn(2, 12, 80).to(device)
    wide[..., ::2] = x.view(2, 12, 40)
    views = {"strided": wide[..., ::2], "transposed": x.view(2, 12, 40).transpose(0, 1).contiguous().transpose(0, 1)}
    y, z = ops.grouped_lora(x, A.T.contiguous().T, B, weight=W, bias=bias)
    for name, view in views.items():
        assert not view.is_contiguous()
        yv, zv = ops.grouped_lora(view, A, B, weight=W, bias=bias)
        assert yv.shape == (2, 12, 32), name
        assert torch.equal(yv.reshape(24, 32), y), name
        assert torch.equal(zv, z), name


@pytest.mark.needs("float64")
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_gradcheck_of_y_and_z_together(p):
    x, A, B, W, bias, base, *_ = (t.double() for t in make(6, 5, 4, 3, 2, torch.float32))
    leaves = [t.requires_grad_() for t in (x, A, B, base)]
    group = torch.tensor([0, 1, 1, 0, 1, 1])

    def call(x, A, B, base):
        return ops.grouped_lora(x, A, B, 0.7, group=group, dropout_p=p, rng=RNG, base_out=base)

    assert torch.autograd.gradcheck(call, leaves)
    x1, A1, B1 = (t.detach().requires_grad_() for t in (x, A[0], B[0]))
    assert torch.autograd.gradcheck(
        lambda x, A, B: ops.grouped_lora(x, A, B, 0.7, dropout_p=p, rng=RNG, weight=W, bias=bias), (x1, A1, B1)
    )


@pytest.mark.parametrize(("weight_form", "groups", "p"), list(itertools.product([True, False], [1, 3], [0.0, 0.2])))
def test_opcheck(device, weight_form, groups, p):
    x, A, B, W, bias, base, *_ = make(12, 10, 8, 4, groups, torch.float32, device=device)
    rng = RNG.to(device) if p else None
    for t in (x, A, B, base):
        t.requires_grad_()
    order = ops.group_rows(torch.arange(12, device=device) % groups, groups) if groups > 1 else None
    weight, bias, base = (W, bias, None) if weight_form else (None, None, base)
    args = (x, A, B, 0.5, None, order, p, rng, weight, bias, base)
    opcheck(torch.ops.align_ext.grouped_lora.default, args)
    y, z = torch.ops.align_ext.grouped_lora(*args)
    detached = [None if t is None else t.detach() for t in (x, z, A, B)]
    opcheck(
        torch.ops.align_ext.grouped_lora_backward.default,
        (y.detach(), z.detach(), *detached, 0.5, None, order, p, rng, weight, True),
    )


def test_compiles_without_a_graph_break(device):
    x, A, B, W, bias, _, dy, _ = make(16, 12, 10, 4, 1, torch.float32, device=device)
    rng = RNG.to(device)

    def loss(x, A, B):
        y, z = ops.grouped_lora(x, A, B, 0.5, dropout_p=0.25, rng=rng, weight=W, bias=bias)
        return (y * dy).sum() + z.square().sum()

    def gradients(f):
        leaves = [t.detach().clone().requires_grad_() for t in (x, A, B)]
        f(*leaves).backward()
        return [t.grad for t in leaves]

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled), gradients(loss), strict=True):
        assert torch.equal(a, b)


@pytest.mark.needs("size")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_twice_and_for_any_number_of_threads(device, dtype):
    inputs, before = make(301, 130, 70, 8, 3, dtype), torch.get_num_threads()
    options = {"weight_form": False, "p": 0.1, "kind": "group", "groups": 3, "device": device}
    try:
        results = []
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(ops.grouped_lora, inputs, None, **options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, tensor in results[0].items():
            assert torch.equal(tensor, other[name]), name


def test_autocast_does_not_reach_into_the_op(device):
    x, A, B, W, bias, _, dy, _ = make(16, 12, 10, 4, 1, torch.float32, device=device)
    leaves = [t.requires_grad_() for t in (x, A, B)]
    y, _ = ops.grouped_lora(*leaves, weight=W, bias=bias)
    y.backward(dy)
    expected = [y.detach(), *(t.grad.clone() for t in leaves)]
    for t in leaves:
        t.grad = None
    with torch.autocast(device.type, torch.bfloat16):
        y, _ = ops.grouped_lora(*leaves, weight=W, bias=bias)
        y.backward(dy)
    for a, b in zip([y, *(t.grad for t in leaves)], expected, strict=True):
        assert torch.equal(a, b)


def test_a_strided_rng_is_read_as_it_is(device):
    x, A, B, _, _, base, *_ = make(16, 64, 8, 4, 1, torch.float32, device=device)
    plain = RNG.to(device)
    strided = torch.stack([plain, plain + 1], dim=1).reshape(-1)[::2]
    z = [ops.grouped_lora(x, A, B, dropout_p=0.5, rng=rng, base_out=base)[1] for rng in (strided, plain)]
    assert torch.equal(*z)


def test_an_order_found_before_is_that_of_the_groups(device):
    group = torch.tensor([2, 0, 2, 2, 0, 3], device=device)
    order = ops.group_rows(group, 5)
    assert order.tolist() == [1, 4, 0, 2, 3, 5, *(0, 2, 2, 5, 6, 6)]
    x, A, B, _, _, base, *_ = make(6, 10, 8, 4, 5, torch.float32, device=device)
    leaves = [[t.clone().requires_grad_() for t in (x, A, B)] for _ in range(2)]
    given = ({"group": group}, {"order": order})
    y, z = zip(*(ops.grouped_lora(*of, base_out=base, **by) for of, by in zip(leaves, given, strict=True)), strict=True)
    torch.autograd.backward([*y, *z], [torch.ones_like(t) for t in (*y, *z)])
    assert torch.equal(*y)
    assert torch.equal(*z)
    for a, b in zip(*leaves, strict=True):
        assert torch.equal(a.grad, b.grad)


@pytest.mark.needs("values")
@pytest.mark.parametrize(
    ("order", "message"), [([0, 1, 3, 0, 2, 3], "order must hold rows of x"), ([0, 1, 2, 0, 2, 2], "offsets must rise")]
)
def test_an_order_of_other_rows_is_refused(device, order, message):
    x, A, B, _, _, base, *_ = make(3, 10, 8, 4, 2, torch.float32, device=device)
    with pytest.raises(RuntimeError, match=message):
        ops.grouped_lora(x, A, B, base_out=base, order=torch.tensor(order, device=device))


def test_tensors_of_another_device_are_named(device):
    x, A, B, W, *_ = make(4, 8, 8, 4, 1, torch.float32, device=device)
    with pytest.raises(RuntimeError, match=f"weight is on meta, but x is on {device}"):
        ops.grouped_lora(x, A, B, weight=W.to("meta"))


def test_inputs_are_not_modified(device):
    x, A, B, _, _, base, *_ = make(12, 10, 8, 4, 1, torch.float32, device=device)
    copy = base.clone()
    ops.grouped_lora(x, A, B, base_out=base)
    assert torch.equal(base, copy)


@pytest.mark.parametrize("dtype", DTYPES)
@FORMS
def test_backward_keeps_x_and_the_latent_alone(device, dtype, weight_form):
    """At most x, which the base keeps anyway, and 4 T r bytes: no mask, no dropped copy of x, nothing of size T m."""
    tokens, n, m, r = 64, 40, 72, 6
    inputs = [t.to(device) for t in make(tokens, n, m, r, 1, dtype)]
    x, A, B, W, bias, base, *_ = inputs
    leaves = [t.detach().requires_grad_() for t in (x, A, B, base)]
    given = {t.data_ptr() for t in (*leaves, W, bias)}
    kept = {}

    def pack(t):
        kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    form = {"weight": W, "bias": bias} if weight_form else {"base_out": leaves[3]}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        ops.grouped_lora(*leaves[:3], dropout_p=0.3, rng=RNG.to(device), **form)
    kept = {pointer: size for pointer, size in kept.items() if pointer not in given}
    assert 0 < sum(kept.values()) <= 4 * tokens * r + RNG.nbytes


def test_the_dropout_mask_follows_torchs_generator(device):
    x, A, B, _, _, base, *_ = make(32, 64, 8, 4, 1, torch.float32, device=device)
    torch.manual_seed(3)
    first, second = (ops.grouped_lora(x, A, B, dropout_p=0.5, base_out=base)[1] for _ in range(2))
    torch.manual_seed(3)
    again = ops.grouped_lora(x, A, B, dropout_p=0.5, base_out=base)[1]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


BAD = {
    "A must be": {"A": torch.zeros(4, 9)},
    "B must be": {"B": torch.zeros(8, 5)},
    "base_out must have shape": {"base_out": torch.zeros(12, 9)},
    "base_out must be of the dtype": {"base_out": torch.zeros(12, 8, dtype=torch.float64)},
    "exactly one of": {"weight": torch.zeros(8, 10)},
    "must be frozen": {"weight": torch.zeros(8, 10, requires_grad=True), "base_out": None},
    "dropout_p must be in": {"dropout_p": 1.0},
    "group must be in 0..0": {"group": torch.ones(12, dtype=torch.int64)},
    "group must have shape": {"group": torch.zeros(11, dtype=torch.int64)},
    "group must be int64": {"group": torch.zeros(12, dtype=torch.int32)},
    "offsets must rise": {"offsets": torch.tensor([0, 11])},
    "rng must have shape": {"dropout_p": 0.5, "rng": torch.zeros(3, dtype=torch.int64)},
    "x must be float32": {
        "x": torch.zeros(12, 10, dtype=torch.int32),
        "base_out": torch.zeros(12, 8, dtype=torch.int32),
    },
}


VALUES = {"group must be in 0..0", "offsets must rise"}  # seen only by reading the tensor
NAMED = [pytest.param(message, marks=[pytest.mark.needs("values")] * (message in VALUES)) for message in BAD]


@pytest.mark.parametrize("message", NAMED)
def test_bad_arguments_are_named(device, message):
    arguments = {"x": torch.zeros(12, 10), "A": torch.zeros(4, 10), "B": torch.zeros(8, 4)}
    arguments |= {"base_out": torch.zeros(12, 8)} | BAD[message]
    arguments = {name: a.to(device) if isinstance(a, torch.Tensor) else a for name, a in arguments.items()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        ops.grouped_lora(arguments.pop("x"), arguments.pop("A"), arguments.pop("B"), **arguments)


def test_several_groups_need_a_grouping(device):
    x, A, B, base = (torch.zeros(shape, device=device) for shape in ((3, 4), (2, 1, 4), (2, 5, 1), (3, 5)))
    with pytest.raises(RuntimeError, match="A holds 2 groups: give offsets or order"):
        ops.grouped_lora(x, A, B, base_out=base)


TRANSFORMS = [torch.func.grad, lambda f: lambda A: torch.func.jvp(f, (A,), (A,))]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["grad", "jvp"])
def test_transforms_of_torch_func_are_refused_in_words(transform):
    x, A, B, weight = torch.randn(3, 8), torch.randn(2, 8), torch.randn(4, 2), torch.randn(4, 8)
    with pytest.raises(RuntimeError, match="Function with functorch transforms"):
        transform(lambda A: ops.grouped_lora(x, A, B, weight=weight)[0].sum())(A)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_frozen_product_may_come_before_or_after_the_low_rank_term(device, dtype):
    """CUDA's choice; a CPU always computes the product first."""
    inputs, results = make(33, 40, 24, 5, 1, dtype), []
    options = {"weight_form": True, "p": 0.25, "kind": "none", "groups": 1}
    for first in (True, False):
        before = _C.low_rank_first(first)
        try:
            results.append(run(ops.grouped_lora, inputs, None, device=device, **options))
        finally:
            assert _C.low_rank_first(before) == first
    for name, found in results[0].items():
        same = device == "cpu" or name not in ("y", "dx")
        unit = 0 if same else torch.finfo(dtype).eps
        torch.testing.assert_close(found, results[1][name], rtol=4 * unit, atol=4 * unit * float(found.abs().max()))
