"""Inputs of dropout_sum and routed_lora, and how their tests run and compare them."""

import pytest
import torch
from closeness import DRAWS, assert_draws_are_as_close_as_torch

from align_ext import ops, reference

RNG = torch.tensor([123456789, 42])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SITES = ["none", "input", "latent", "input_per_head"]
EVERY_SITE = pytest.mark.parametrize("site", SITES)
# tokens, in, out, rank, heads: ordinary, odd, degenerate
SHAPES = [
    (64, 128, 96, 8, 3),
    (65, 67, 45, 5, 4),
    (35, 200, 24, 70, 2),
    (33, 31, 129, 17, 1),
    (7, 1, 1, 1, 2),
    (0, 16, 8, 4, 2),
]
NOT_LEAVES = ("W", "bias", "A0", "B0")


def make(shape, dtype, *, adapters=None, groups=0, A_per_head=False, offset_rank=0, site="latent", base=1, seed=0):
    """Inputs by name whose low-rank term is as large as the base, times base; with groups > 0 those of routed_lora."""
    tokens, n, m, r, heads = shape
    g = torch.Generator().manual_seed(seed)
    adapters = adapters or dtype

    def normal(*size, scale=1.0, dtype=dtype):
        return (torch.randn(size, generator=g) * scale).to(dtype)

    inputs = {
        "x": normal(tokens, n),
        "A": normal(*([heads] if A_per_head else []), r, n, scale=n**-0.5, dtype=adapters),
        "B": normal(heads, m, r, scale=r**-0.5, dtype=adapters),
        "W": normal(m, n, scale=base * n**-0.5),
        "bias": normal(m, scale=base),
        "base": normal(tokens, m),
        "dy": normal(tokens, m),
        "dz": normal(tokens, *([heads] if A_per_head or site == "input_per_head" else []), r, dtype=torch.float32),
    }
    if offset_rank:
        inputs["A0"] = normal(offset_rank, n, scale=n**-0.5, dtype=adapters)
        inputs["B0"] = normal(m, offset_rank, scale=offset_rank**-0.5, dtype=adapters)
    if groups:
        inputs["R"] = normal(groups * heads, n, scale=n**-0.5, dtype=adapters)
        inputs["dw"] = normal(tokens, groups, heads, dtype=torch.float32)
    return inputs


def leaves_of(inputs, device="cpu"):
    """Copies on a device; what is trained requires its gradient."""
    return {
        name: tensor.detach().to(device).clone().requires_grad_(name in ("x", "A", "B", "R", "base"))
        for name, tensor in inputs.items()
    }


def call(op, leaves, *, weight_form=True, **options):
    """Outputs of an op, of its name, or of a reference."""
    op = getattr(ops, op) if isinstance(op, str) else op
    form = {"weight": leaves["W"], "bias": leaves["bias"]} if weight_form else {"base_out": leaves["base"]}
    offset = {name: leaves[name] for name in ("A0", "B0") if name in leaves}
    router = (leaves["R"],) if "R" in leaves else ()
    if options.get("dropout_p"):
        options.setdefault("rng", RNG.to(leaves["x"].device))
    return op(leaves["x"], leaves["A"], leaves["B"], *router, scaling=0.75, **form, **offset, **options)


def results(op, inputs, device="cpu", **options):
    """Outputs and every gradient, by name; B's for each head."""
    leaves = leaves_of(inputs, device)
    outputs = call(op, leaves, **options)
    grads = [leaves[name].to(y.dtype) for name, y in zip(("dy", "dz", "dw"), outputs, strict=False)]
    torch.autograd.backward(outputs, grads)
    named = dict(zip(("y", "z", "w"), outputs, strict=False))
    named |= {f"d{name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    for i, head in enumerate(named.pop("dB")):
        named[f"dB[{i}]"] = head
    return {name: tensor.detach().cpu() for name, tensor in named.items()}


def compare(op, device, inputs, draws=DRAWS, **options):
    """Holds an op to the tolerance rule on inputs(seed); the references see the adapters as the op rounds them."""

    def draw(seed):
        drawn = inputs(seed=seed)
        dtype = drawn["x"].dtype
        rounded = {name: t if name in ("dz", "dw") else t.to(dtype) for name, t in drawn.items()}
        double = {name: t.double() for name, t in rounded.items()}
        oracle = getattr(reference, op)
        return tuple(results(*of, **options) for of in ((op, drawn, device), (oracle, rounded), (oracle, double)))

    return assert_draws_are_as_close_as_torch(draw, draws)


def gradients(loss, leaves):
    """Gradients of a scalar function of tensors."""
    copies = [t.detach().clone().requires_grad_() for t in leaves]
    loss(*copies).backward()
    return [t.grad for t in copies]


def same_bits_for_any_number_of_threads(run):
    """Runs with 1, 1, 2 and 3 threads and compares results by name."""
    before, every = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            every.append(run())
    finally:
        torch.set_num_threads(before)
    for other in every[1:]:
        for name, tensor in every[0].items():
            assert torch.equal(tensor, other[name]), name


def bytes_saved(run):
    """What autograd saves while run() makes its outputs: bytes by storage."""
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = run()
    del outputs
    return saved
