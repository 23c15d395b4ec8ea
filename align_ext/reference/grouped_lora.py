"""The oracle of align_ext/ops/grouped_lora.py."""

import torch
from torch import Tensor

from align_ext.reference.philox import dropout_mask


def grouped_lora(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float = 1.0,
    *,
    offsets: Tensor | None = None,
    group: Tensor | None = None,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    base_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes y = base(x) + scaling * B_k A_k xd per row of group k, and z = A_k xd."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    rows = x.reshape(-1, x.shape[-1])
    mask = dropout_mask(rng, dropout_p, rows.shape, x.dtype) if dropout_p > 0 and rng is not None else 1
    xd = rows * mask
    if A.dim() == 2:
        A, B, offsets = A[None], B[None], torch.tensor([0, len(rows)])
    if offsets is not None:
        group = torch.repeat_interleave(torch.arange(len(A)), offsets.diff())
    assert group is not None
    z = torch.stack([A[k] @ xd[t] for t, k in enumerate(group.tolist())]) if len(rows) else xd @ A[0].T
    low = torch.stack([B[k] @ z[t] for t, k in enumerate(group.tolist())]) if len(rows) else z @ B[0].T
    base = torch.nn.functional.linear(x, weight, bias) if weight is not None else base_out
    assert base is not None
    return base + scaling * low.reshape(base.shape), z.to(torch.promote_types(z.dtype, torch.float32))
