"""Sibling LoRA: the LoRA of up to three layers that see the same x, with their frozen weights, in one pass over x.

Native side: csrc/ops/sibling_lora.h. Oracle: align_ext/reference/sibling_lora.py.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from align_ext.ops import _projection as projection
from align_ext.ops._autograd import differentiable

MAX_SIBLINGS = 3  # kMaxSiblings


def sibling_lora(
    x: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scaling: Sequence[float],
    *,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Computes y_i = x W_iᵀ + bias_i + s_i B_i A_i xd_i and z_i = A_i xd_i of up to three layers i with the same x.

    xd_i = x * mask_i is x after input dropout; the masks of a token follow one another in the dropout numbers of
    csrc/ops/philox.h, (t * layers + i) * in_dim + c.
    Backward, with g_i = dL/dy_i:  dz_i += s_i g_i B_i,  dB_i = s_i g_iᵀ z_i,  dA_i = dz_iᵀ xd_i,
    dx = Σ_i g_i W_i + (dz_i A_i) * mask_i. Each layer is the LoRA of grouped_lora (2106.09685, 2508.05078): q, k and v
    of an attention, gate and up of an MLP. On CUDA x is read once in each direction and dx is written once; an operator
    for each layer reads x as often as there are layers, and autograd adds up their dx.

    Args:
        x: [..., in_dim], float32, bfloat16 or float16 (float64 on the CPU, for gradient checks). T = all rows of x.
        A: [rank_i, in_dim] of each layer, rank_i > 0, of one of these dtypes (rounded to x's in the product).
        B: [out_dim_i, rank_i] of each layer, likewise.
        scaling: lora_alpha / r of each layer, or lora_alpha / sqrt(r).
        dropout_p: probability of dropping an element of x, in [0, 1).
        rng: int64 [2] (seed, offset) of the masks; drawn from torch's generator if not given.
        weight: [out_dim_i, in_dim] of each layer, the frozen base weights, in x's dtype.
        bias: [out_dim_i] of each layer, frozen, or None for a layer that has none.

    Returns:
        y: [..., out_dim_i] of each layer in x's dtype, new tensors.
        z: [T, rank_i] of each layer, float32 (float64 for float64); differentiable, for any loss.

    Raises:
        ValueError: arguments that contradict each other.
        RuntimeError: shapes or dtypes that do not match; the message names the argument.
    """
    count = len(A)
    biases: Sequence[Tensor | None] = [None] * count if bias is None else bias
    if not 1 <= count <= MAX_SIBLINGS or {len(given) for given in (B, scaling, weight, biases)} != {count}:
        raise ValueError(
            f"A, B, scaling, weight and bias must have an element for each of 1 to {MAX_SIBLINGS} layers, got "
            f"{count}, {len(B)}, {len(scaling)}, {len(weight)} and {len(biases)}"
        )
    for base in zip(weight, biases, strict=True):
        rng = projection.checked_rng(x, dropout_p, rng, *base, None)
    given = _or_empty(biases, x)
    outputs = _sibling_lora(x, list(A), list(B), list(scaling), dropout_p, rng, list(weight), given)
    return outputs[:count], outputs[count:]


def _or_empty(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Returns the tensors as the operators take them: none at all, or one without elements for each None."""
    if all(tensor is None for tensor in tensors):
        return []
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


@torch.library.register_fake("align_ext::sibling_lora")
def _(
    x: Tensor, A: list[Tensor], B: list[Tensor], scaling: list[float], p: float, rng: Any, weight: list[Tensor],
    bias: list[Tensor],
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    layers = [
        projection.empty_outputs(x, B[i], (A[i].shape[-2],), {"weight": weight[i], "bias": (bias or weight)[i]}, A=A[i])
        for i in range(len(A))
    ]
    return [y for y, _ in layers], [z for _, z in layers]


@torch.library.register_fake("align_ext::sibling_lora_backward")
def _(
    dy: list[Tensor], dz: list[Tensor], x: Tensor, z: list[Tensor], A: list[Tensor], B: list[Tensor],
    scaling: list[float], p: float, rng: Any, weight: list[Tensor], need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:  # fmt: skip
    dx, *gradients = projection.empty_gradients(x, need_dx, *A, *B)
    return dx, gradients[: len(A)], gradients[len(A) :]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, A, B, ctx.scaling, ctx.p, rng, weight, _ = inputs
    ctx.save_for_backward(x, rng, *output[len(A) :], *A, *B, *weight)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    x, rng, *saved = ctx.saved_tensors
    ctx.went_back = True  # its grad_fn says so to whoever has kept an output
    count = len(ctx.scaling)
    z, A, B, weight, dy, dz = (list([*saved, *d_outputs][k * count : (k + 1) * count]) for k in range(6))
    used = [dy[i] is not None or dz[i] is not None for i in range(count)]
    dy = [projection.output_gradient("sibling_lora", of_layer, x, b) for of_layer, b in zip(dy, B, strict=True)]
    dx, dA, dB = _gradients(dy, _or_empty(dz, x), x, z, A, B, ctx.scaling, ctx.p, rng, weight, ctx.needs_input_grad[0])
    return (
        dx if ctx.needs_input_grad[0] else None,
        *(d.to(adapter.dtype) if use else None for d, adapter, use in zip([*dA, *dB], [*A, *B], 2 * used, strict=True)),
    )


_gradients = torch.ops.align_ext.sibling_lora_backward.default
_sibling_lora = differentiable("sibling_lora", _backward, _setup_context, ["x", "A", "B"])
