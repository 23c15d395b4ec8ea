"""Heads weighted by a router: the low-rank path of HydraLoRA, R-LoRA, LoRA-MoE and mtLoRA.

Native side: csrc/ops/routed_lora.h. Oracle: align_ext/reference/routed_lora.py.
"""

from typing import Any

import torch
from torch import Tensor

from align_ext.ops import _projection as projection
from align_ext.ops._autograd import differentiable


def routed_lora(
    x: Tensor, A: Tensor, B: Tensor, R: Tensor, scaling: float = 1.0, *, top_k: int | None = None, tau: float = 1.0,
    site: projection.Site = "input", dropout_p: float = 0.0, rng: Tensor | None = None, A0: Tensor | None = None,
    B0: Tensor | None = None, weight: projection.Weight = None, bias: Tensor | None = None,
    base_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes y = base(x) + scaling Σ_i w[t, k, i] u_i B_iᵀ, k = floor(o G / out_dim), with a router's weights w.

    w[t, k, :] = softmax(x Rᵀ / tau) over the N heads (or the top_k largest, ties to the lowest index; 0 elsewhere), on
    x without dropout; output o has the weights of its group k of G. HydraLoRA (2404.19245): G = 1; R-LoRA (2502.15455):
    site "latent"; LoRAMoE (2312.09979): one A per head, top_k; mtLoRA (2603.01526): G > 1.
    u_i, z and the frozen offset path with A0, B0 are those of dropout_sum; with one A per head, z_i = xd A_iᵀ.
    Backward, with g = dL/dy, g_k its columns of group k and q_ik = g_k B_ik:  dw += scaling u_i · q_ik,
    dlogit = w (dw - Σ_j w_j dw_j) / tau,  dR = dlogitᵀ x,  du_i = scaling Σ_k w_ik q_ik,
    dB_ik = scaling (w_ik g_k)ᵀ u_i;  dz, dA, dx from du_i as in dropout_sum, dx += dlogit R.

    Args:
        x: [..., in_dim], float32, bfloat16 or float16 (float64 on the CPU, for gradient checks). T = all rows of x.
        A: [rank, in_dim], or [N, rank, in_dim] with one A per head, of one of these dtypes (rounded to x's in the
            product).
        B: [N, out_dim, rank], likewise.
        R: [G * N, in_dim], likewise; row k N + i belongs to head i in group k. G must divide out_dim.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        top_k: the number of heads with a weight above 0, 1 .. N; all heads if not given.
        tau: the softmax's temperature, positive.
        site: as in dropout_sum: the tensor that dropout acts on.
        dropout_p: as in dropout_sum.
        rng: as in dropout_sum.
        A0: as in dropout_sum.
        B0: as in dropout_sum; the mean of the B_i at initialisation, exact while the weights are uniform.
        weight: as in dropout_sum: the frozen base layer.
        bias: as in dropout_sum.
        base_out: as in dropout_sum.

    Returns:
        y: [..., out_dim] in x's dtype, a new tensor.
        z: [T, rank], or [T, N, rank] with one A per head or site "input_per_head"; float32 (float64 for float64).
        w: [T, G, N], likewise. Both are differentiable, for any loss.

    Raises:
        ValueError: arguments that contradict each other.
        RuntimeError: shapes or dtypes that do not match; the message names the argument.
    """
    rng = projection.checked_rng(x, dropout_p, rng, weight, bias, base_out)
    site_id = projection.checked_site(site, dropout_p, A0, B0)
    k = len(B) if top_k is None else top_k
    return _routed_lora(x, A, B, R, scaling, -scaling, A0, B0, k, tau, site_id, dropout_p, rng, weight, bias, base_out)


@torch.library.register_fake("align_ext::routed_lora")
def _(
    x: Tensor, A: Tensor, B: Tensor, R: Tensor, scaling: float, offset_scaling: float, A0: Any, B0: Any, top_k: int,
    tau: float, site: int, p: float, rng: Any, weight: Any, bias: Any, base_out: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    base = {"weight": weight, "bias": bias, "base_out": base_out}
    y, z = projection.empty_outputs(x, B, projection.latent_shape(A, B, site), base, A=A, R=R, A0=A0, B0=B0)
    return y, z, z.new_empty((z.shape[0], R.shape[0] // B.shape[0], B.shape[0]))


@torch.library.register_fake("align_ext::routed_lora_backward")
def _(
    dy: Tensor, dz: Any, dw: Any, x: Tensor, z: Tensor, w: Tensor, A: Tensor, B: Tensor, R: Tensor, scaling: float,
    offset_scaling: float, A0: Any, B0: Any, tau: float, site: int, p: float, rng: Any, weight: Any, need_dx: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return projection.empty_gradients(x, need_dx, A, B, R)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, A, B, R, *scalings, A0, B0, _, tau, site, p, rng, weight, _, _ = inputs
    ctx.options = (*scalings, tau, site, p)
    ctx.save_for_backward(x, *output[1:], A, B, R, A0, B0, rng, projection.keep_weight(ctx, weight))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None, dw: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, w, A, B, R, A0, B0, rng, saved = ctx.saved_tensors
    weight = projection.weight_again(ctx, saved)
    dy = projection.output_gradient("routed_lora", dy, x, B)
    scaling, offset_scaling, tau, site, p = ctx.options
    grads = _gradients(
        dy, dz, dw, x, z, w, A, B, R, scaling, offset_scaling, A0, B0, tau, site, p, rng, weight,
        ctx.needs_input_grad[0],
    )  # fmt: skip
    return projection.gradients(ctx, grads, dy if weight is None else None)


_gradients = torch.ops.align_ext.routed_lora_backward.default
_routed_lora = differentiable("routed_lora", _backward, _setup_context, ["x", "A", "B", "R", "base_out"])
