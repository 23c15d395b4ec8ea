"""The sum of heads with dropout: the low-rank path of M-LoRA and of HydraLoRA without a router.

Native side: csrc/ops/dropout_sum.h. Oracle: align_ext/reference/dropout_sum.py.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from align_ext.ops import _projection as projection
from align_ext.ops._autograd import differentiable


def dropout_sum(
    x: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, *, reduce: Literal["sum", "mean"] = "sum",
    site: projection.Site = "latent", dropout_p: float = 0.0, rng: Tensor | None = None, A0: Tensor | None = None,
    B0: Tensor | None = None, weight: projection.Weight = None, bias: Tensor | None = None,
    base_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes y = base(x) + scaling c Σ_i u_i B_iᵀ over the N heads, and the latent z; c = 1, or 1/N for "mean".

    By site, with masks of csrc/ops/philox.h:  "latent": z = x Aᵀ, u_i = z * mask_i (M-LoRA, 2508.05078; R-LoRA's
    heads, 2502.15455);  "input_per_head": z_i = (x * mask_i) Aᵀ, u_i = z_i (HydraLoRA's released semantics,
    2404.19245);  "input": z = (x * mask) Aᵀ, u_i = z;  "none": z = x Aᵀ, u_i = z.
    With A0 and B0 the frozen offset path y -= scaling (xd A0ᵀ) B0ᵀ subtracts the heads' initial value (R-LoRA);
    xd is x * mask for site "input" and x for the others, whose masks belong to the heads.
    Without dropout the op is LoRA with A and c Σ_i B_i, less the offset.
    Backward, with g = dL/dy:  du_i = scaling c g B_i,  dB_i = scaling c gᵀ u_i,  dz += Σ_i mask_i * du_i (one latent
    per head: dz_i += du_i),  dA = dzᵀ xd,  dx = g weight + (dz A) * mask - scaling (g B0 A0) * mask,  d_base_out = g.

    Args:
        x: [..., in_dim], float32, bfloat16 or float16 (float64 on the CPU, for gradient checks). T = all rows of x.
        A: [rank, in_dim], of one of these dtypes (rounded to x's in the product).
        B: [N, out_dim, rank], likewise.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        reduce: "sum" over the heads, or their "mean".
        site: the tensor that dropout acts on.
        dropout_p: probability of dropping an element, in [0, 1).
        rng: int64 [2] (seed, offset) of the masks; drawn from torch's generator if not given.
        A0: [offset_rank, in_dim], frozen, dtype as of A; with B0 only.
        B0: [out_dim, offset_rank], frozen; c Σ_i B_i at initialisation.
        weight: as in grouped_lora: give the frozen base layer's weight and bias, or its output base_out.
        bias: as in grouped_lora.
        base_out: as in grouped_lora.

    Returns:
        y: [..., out_dim] in x's dtype, a new tensor.
        z: [T, rank], or [T, N, rank] for site "input_per_head"; float32 (float64 for float64); differentiable.

    Raises:
        ValueError: arguments that contradict each other.
        RuntimeError: shapes or dtypes that do not match; the message names the argument.
    """
    if reduce not in ("sum", "mean"):
        raise ValueError(f'reduce must be "sum" or "mean", got {reduce!r}')
    rng = projection.checked_rng(x, dropout_p, rng, weight, bias, base_out)
    site_id = projection.checked_site(site, dropout_p, A0, B0)
    head_scaling = scaling / max(len(B), 1) if reduce == "mean" else scaling
    return _dropout_sum(x, A, B, head_scaling, -scaling, A0, B0, site_id, dropout_p, rng, weight, bias, base_out)


@torch.library.register_fake("align_ext::dropout_sum")
def _(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, offset_scaling: float, A0: Any, B0: Any, site: int, p: float,
    rng: Any, weight: Any, bias: Any, base_out: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    base = {"weight": weight, "bias": bias, "base_out": base_out}
    return projection.empty_outputs(x, B, projection.latent_shape(A, B, site), base, A=A, A0=A0, B0=B0)


@torch.library.register_fake("align_ext::dropout_sum_backward")
def _(
    dy: Tensor, dz: Any, x: Tensor, z: Tensor, A: Tensor, B: Tensor, scaling: float, offset_scaling: float, A0: Any,
    B0: Any, site: int, p: float, rng: Any, weight: Any, need_dx: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return projection.empty_gradients(x, need_dx, A, B)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, *scalings, A0, B0, site, p, rng, weight, _, _ = inputs
    ctx.options = (*scalings, site, p)
    ctx.save_for_backward(x, output[1], A, B, A0, B0, rng, projection.keep_weight(ctx, weight))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, A, B, A0, B0, rng, saved = ctx.saved_tensors
    weight = projection.weight_again(ctx, saved)
    dy = projection.output_gradient("dropout_sum", dy, x, B)
    scaling, offset_scaling, site, p = ctx.options
    grads = _gradients(
        dy, dz, x, z, A, B, scaling, offset_scaling, A0, B0, site, p, rng, weight, ctx.needs_input_grad[0]
    )
    return projection.gradients(ctx, grads, dy if weight is None else None)


_gradients = torch.ops.align_ext.dropout_sum_backward.default
_dropout_sum = differentiable("dropout_sum", _backward, _setup_context, ["x", "A", "B", "base_out"])
