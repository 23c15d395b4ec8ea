"""Sibling LoRA: the low-rank paths of up to three layers that see the same x, with their frozen weights, in one call.

Native side: csrc/ops/sibling_lora.h. Oracle: align_ext/reference/sibling_lora.py.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from align_ext.ops import _projection as projection
from align_ext.ops._autograd import differentiable

MAX_SIBLINGS = 3  # kMaxSiblings


def sibling_lora(
    x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scaling: Sequence[float], *, R: Sequence[Tensor] = (),
    reduce: Literal["sum", "mean"] = "sum", top_k: int | None = None, tau: float = 1.0,
    site: projection.Site = "input", dropout_p: float = 0.0, rng: Tensor | None = None, A0: Sequence[Tensor] = (),
    B0: Sequence[Tensor] = (), weight: Sequence[Tensor], bias: Sequence[Tensor | None] | None = None,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:  # fmt: skip
    """Computes y_i, z_i and w_i of up to three layers i with the same x: q, k and v of an attention; gate and up.

    Each layer is what dropout_sum makes of it or, with a router R_i, routed_lora; with B_i [out_dim_i, rank_i] and
    neither router nor offset it is LoRA (2106.09685, 2508.05078), y_i = x W_iᵀ + bias_i + s_i B_i A_i xd_i. The masks
    of a token follow one another in the dropout numbers of csrc/ops/philox.h (csrc/ops/sibling_lora.h).
    Backward: of each layer as there, and dx = Σ_i g_i W_i + (low rank)_i. On CUDA dx is written once, and x is read
    once in each direction for each 64 ranks of all layers (with dropout on x, backward reads it for each mask); an
    operator for each layer reads x as often as there are layers, and autograd adds up their dx.

    Args:
        x: [..., in_dim], float32, bfloat16 or float16 (float64 on the CPU, for gradient checks). T = all rows of x.
        A: [rank_i, in_dim] of each layer, rank_i > 0, or, with routers, [N, rank_i, in_dim] with one A per head; of one
            of these dtypes (rounded to x's in the product).
        B: [out_dim_i, rank_i] of each layer, or [N, out_dim_i, rank_i] with N heads in all layers, likewise.
        scaling: lora_alpha / r of each layer, or lora_alpha / sqrt(r).
        R: [G_i * N, in_dim] of each layer, as in routed_lora, likewise; empty: there are no routers.
        reduce: as in dropout_sum, without routers.
        top_k: as in routed_lora.
        tau: as in routed_lora.
        site: the tensor that dropout acts on, as in dropout_sum; "input_per_head" is refused.
        dropout_p: probability of dropping an element, in [0, 1).
        rng: int64 [2] (seed, offset) of the masks; drawn from torch's generator if not given.
        A0: [offset_rank_i, in_dim] of each layer, frozen, dtype as of A; with B0 only; empty: there are no offsets.
        B0: [out_dim_i, offset_rank_i] of each layer, frozen.
        weight: [out_dim_i, in_dim] of each layer, the frozen base weights, in x's dtype.
        bias: [out_dim_i] of each layer, frozen, or None for a layer that has none.

    Returns:
        y: [..., out_dim_i] of each layer in x's dtype, new tensors.
        z: [T, rank_i] of each layer, or [T, N, rank_i] with one A per head; float32 (float64 for float64).
        w: [T, G_i, N] of each layer, likewise; empty without routers. z and w are differentiable, for any loss.

    Raises:
        ValueError: arguments that contradict each other.
        RuntimeError: shapes or dtypes that do not match; the message names the argument.
    """
    count = len(A)
    biases: Sequence[Tensor | None] = [None] * count if bias is None else bias
    lengths = {len(given) for given in (B, scaling, weight, biases)} | {len(given) for given in (R, A0, B0) if given}
    if not 1 <= count <= MAX_SIBLINGS or lengths != {count}:
        raise ValueError(
            f"A, B, scaling, weight and bias, and R, A0 and B0 if given, must have an element for each of 1 to "
            f"{MAX_SIBLINGS} layers, got {count}, {len(B)}, {len(scaling)}, {len(weight)}, {len(biases)}, {len(R)}, "
            f"{len(A0)} and {len(B0)}"
        )
    if reduce not in ("sum", "mean"):
        raise ValueError(f'reduce must be "sum" or "mean", got {reduce!r}')
    for base in zip(weight, biases, strict=True):
        rng = projection.checked_rng(x, dropout_p, rng, *base, None)
    none: Sequence[Tensor | None] = [None]
    site_ids = [
        projection.checked_site(site, dropout_p, *offset) for offset in zip(A0 or none, B0 or none, strict=False)
    ]
    heads = B[0].shape[0] if B[0].dim() == 3 else 1
    outputs = _sibling_lora(
        x, list(A), list(B), list(R), [s / heads if reduce == "mean" else s for s in scaling], [-s for s in scaling],
        list(A0), list(B0), heads if top_k is None else top_k, tau, site_ids[0], dropout_p, rng, list(weight),
        _or_empty(biases, x),
    )  # fmt: skip
    return outputs[:count], outputs[count : 2 * count], outputs[2 * count :]


def _or_empty(tensors: Sequence[Tensor | None], like: Tensor) -> list[Tensor]:
    """Returns the tensors as the operators take them: none at all, or one without elements for each None."""
    if all(tensor is None for tensor in tensors):
        return []
    return [like.new_empty(0) if tensor is None else tensor for tensor in tensors]


@torch.library.register_fake("align_ext::sibling_lora")
def _(
    x: Tensor, A: list[Tensor], B: list[Tensor], R: list[Tensor], scaling: list[float], offset_scaling: list[float],
    A0: list[Tensor], B0: list[Tensor], top_k: int, tau: float, site: int, p: float, rng: Any, weight: list[Tensor],
    bias: list[Tensor],
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    y, z, w = [], [], []
    for i, b in enumerate(B):
        base: dict[str, Tensor | None] = {"weight": weight[i], "bias": (bias or weight)[i]}
        others: dict[str, Tensor | None] = {
            name: of_layers[i] for name, of_layers in {"R": R, "A0": A0, "B0": B0}.items() if of_layers
        }
        of_y, of_z = projection.empty_outputs(x, b, projection.latent_shape(A[i], b, site), base, A=A[i], **others)
        y.append(of_y)
        z.append(of_z)
        if R:
            w.append(of_z.new_empty((of_z.shape[0], R[i].shape[0] // b.shape[0], b.shape[0])))
    return y, z, w


@torch.library.register_fake("align_ext::sibling_lora_backward")
def _(
    dy: list[Tensor], dz: list[Tensor], dw: list[Tensor], x: Tensor, z: list[Tensor], w: list[Tensor], A: list[Tensor],
    B: list[Tensor], R: list[Tensor], scaling: list[float], offset_scaling: list[float], A0: list[Tensor],
    B0: list[Tensor], tau: float, site: int, p: float, rng: Any, weight: list[Tensor], need_dx: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
    dx, *gradients = projection.empty_gradients(x, need_dx, *A, *B, *R)
    return dx, gradients[: len(A)], gradients[len(A) : 2 * len(A)], gradients[2 * len(A) :]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, A, B, R, *scalings, A0, B0, _, tau, site, p, rng, weight, _ = inputs
    ctx.options = (*scalings, tau, site, p)
    ctx.has_offset = bool(A0)
    ctx.save_for_backward(x, rng, *A, *B, *weight, *output[len(A) :], *R, *A0, *B0)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *d_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    x, rng, *saved = ctx.saved_tensors
    ctx.went_back = True  # its grad_fn says so to whoever has kept an output
    scaling, offset_scaling, tau, site, p = ctx.options
    count, left = len(scaling), iter(saved)
    routed, offset = len(d_outputs) == 3 * count, ctx.has_offset
    A, B, weight, z, w, R, A0, B0 = (
        [next(left) for _ in range(count * given)] for given in (1, 1, 1, 1, routed, routed, offset, offset)
    )
    dy, dz, dw = (d_outputs[k * count : (k + 1) * count] for k in range(3))
    used = [any(d_outputs[k] is not None for k in range(i, len(d_outputs), count)) for i in range(count)]
    given = [projection.output_gradient("sibling_lora", of_layer, x, b) for of_layer, b in zip(dy, B, strict=True)]
    dx, *gradients = _gradients(
        given, _or_empty(dz, x), _or_empty(dw, x), x, z, w, A, B, R, scaling, offset_scaling, A0, B0, tau, site, p, rng,
        weight, ctx.needs_input_grad[0],
    )  # fmt: skip
    pairs = zip((d for of_layers in gradients for d in of_layers), (2 + routed) * used, strict=True)
    return dx if ctx.needs_input_grad[0] else None, *(d if use else None for d, use in pairs)


_gradients = torch.ops.align_ext.sibling_lora_backward.default
_sibling_lora = differentiable("sibling_lora", _backward, _setup_context, ["x", "A", "B", "R"])
