"""Grouped LoRA: the low-rank path of LoRA, Align-LoRA and Multi-Adapter, with the frozen base layer.

Native side: csrc/ops/grouped_lora.h. Oracle: align_ext/reference/grouped_lora.py.
"""

from typing import Any

import torch
from torch import Tensor

from align_ext.ops import _projection as projection
from align_ext.ops._autograd import differentiable
from align_ext.ops._checks import check_integers


def grouped_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    offsets: Tensor | None = None,
    group: Tensor | None = None,
    order: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    weight: projection.Weight = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes y = base(x) + scaling * B_k A_k xd for each row, k the row's group, and the latent z = A_k xd.

    xd = x * mask is x after input dropout (masks: csrc/ops/philox.h); base(x) is x weightᵀ + bias, or base_out.
    Backward, with g = dL/dy:  dz += scaling g B,  dB = scaling gᵀ z,  dA = dzᵀ xd,  dx = g weight + (dz A) * mask,
    d_base_out = g. LoRA (2106.09685), Align-LoRA (2508.05078); Multi-Adapter is one group per task.

    Args:
        x: [..., in_dim], float32, bfloat16 or float16 (float64 on the CPU, for gradient checks). T = all rows of x.
        A: [rank, in_dim] or [groups, rank, in_dim], of one of these dtypes (rounded to x's in the product).
        B: [out_dim, rank] or [groups, out_dim, rank], likewise.
        scaling: lora_alpha / r, or lora_alpha / sqrt(r).
        offsets: int64 [groups + 1]; group k owns rows offsets[k] .. offsets[k+1] of x. Groups may be empty.
        group: int64 [T], the group of each row, instead of offsets. Neither is needed with one group.
        order: group_rows(group, groups) instead of group, for several calls with the same groups. On CUDA its rows are
            taken as they are.
        dropout_p: probability of dropping an element of x, in [0, 1).
        rng: int64 [2] (seed, offset) of the mask; drawn from torch's generator if not given.
        weight: [out_dim, in_dim], the frozen base weight, in x's dtype, or a function that makes it, which is called
            once in each direction, so that only a quantised form stays. Exactly one of weight and base_out.
        bias: [out_dim], frozen, with weight only.
        base_out: [..., out_dim], the base layer's output, in x's dtype; differentiable, not modified.

    Returns:
        y: [..., out_dim] in x's dtype, a new tensor.
        z: [T, rank], float32 (float64 for float64); differentiable, for any loss.

    Raises:
        ValueError: arguments that contradict each other.
        RuntimeError: shapes or dtypes that do not match; the message names the argument.
    """
    if sum(given is not None for given in (offsets, group, order)) > 1:
        raise ValueError("give one of offsets, group and order")
    rng = projection.checked_rng(x, dropout_p, rng, weight, bias, base_out)
    if group is not None:
        if group.shape != (x.shape[:-1].numel(),):
            raise RuntimeError(f"group must have shape {[x.shape[:-1].numel()]}, got {list(group.shape)}")
        order = group_rows(group, A.shape[0] if A.dim() == 3 else 1)
    return _grouped_lora(x, A, B, scaling, offsets, order, dropout_p, rng, weight, bias, base_out)


def group_rows(group: Tensor, groups: int) -> Tensor:
    """Sorts rows by their groups, for grouped_lora; stable.

    Args:
        group: int64 [T], the group of each row, in 0 .. groups-1.
        groups: their number.

    Returns:
        int64 [T + groups + 1]: the rows in the order of their groups, then where each group begins, and T.

    Raises:
        RuntimeError: not of int64, or another group (on CUDA the program stops).
    """
    return torch.ops.align_ext.group_rows.default(group, groups)


@torch.library.register_fake("align_ext::group_rows")
def _(group: Tensor, groups: int) -> Tensor:
    check_integers(group=group)
    return group.new_empty((group.shape[0] + groups + 1,))


@torch.library.register_fake("align_ext::grouped_lora")
def _(
    x: Tensor, A: Tensor, B: Tensor, scaling: float, offsets: Any, order: Any, p: float, rng: Any,
    weight: Any, bias: Any, base_out: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    base = {"weight": weight, "bias": bias, "base_out": base_out}
    return projection.empty_outputs(x, B, (A.shape[-2],), base, A=A)


@torch.library.register_fake("align_ext::grouped_lora_backward")
def _(
    dy: Tensor, dz: Any, x: Tensor, z: Tensor, A: Tensor, B: Tensor, scaling: float, offsets: Any, order: Any,
    p: float, rng: Any, weight: Any, need_dx: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return projection.empty_gradients(x, need_dx, A, B)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, A, B, ctx.scaling, offsets, order, ctx.p, rng, weight, _, _ = inputs
    ctx.save_for_backward(x, output[1], A, B, offsets, order, rng, projection.keep_weight(ctx, weight))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dz: Tensor | None) -> tuple[Tensor | None, ...]:
    x, z, A, B, offsets, order, rng, saved = ctx.saved_tensors
    weight = projection.weight_again(ctx, saved)
    dy = projection.output_gradient("grouped_lora", dy, x, B)
    grads = _gradients(dy, dz, x, z, A, B, ctx.scaling, offsets, order, ctx.p, rng, weight, ctx.needs_input_grad[0])
    return projection.gradients(ctx, grads, dy if weight is None else None)


_gradients = torch.ops.align_ext.grouped_lora_backward.default
_grouped_lora = differentiable("grouped_lora", _backward, _setup_context, ["x", "A", "B", "base_out"])
