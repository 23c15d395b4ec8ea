"""The oracle of align_ext/ops/sibling_lora.py: one layer after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from align_ext.reference.philox import dropout_mask


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
    """Computes y_i = x W_iᵀ + bias_i + s_i B_i A_i xd_i and z_i = A_i xd_i of layers with the same x."""
    rows = x.reshape(-1, x.shape[-1])
    shape = (len(rows), len(A), rows.shape[1])
    masks = dropout_mask(rng, dropout_p, shape, x.dtype) if dropout_p > 0 and rng is not None else None
    outputs = []
    for i, (a, b, s, w) in enumerate(zip(A, B, scaling, weight, strict=True)):
        z = (rows if masks is None else rows * masks[:, i]) @ a.to(x.dtype).T
        base = linear(x, w, None if bias is None else bias[i])
        outputs.append((base + s * (z @ b.to(x.dtype).T).reshape(base.shape), z))
    wide = torch.promote_types(x.dtype, torch.float32)
    return tuple(y for y, _ in outputs), tuple(z.to(wide) for _, z in outputs)
