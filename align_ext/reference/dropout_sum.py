"""The oracle of align_ext/ops/dropout_sum.py."""

import torch
from torch import Tensor

from align_ext.reference.philox import dropout_mask


def dropout_sum(
    x: Tensor, A: Tensor, B: Tensor, scaling: float = 1.0, *, reduce: str = "sum", site: str = "latent",
    dropout_p: float = 0.0, rng: Tensor | None = None, A0: Tensor | None = None, B0: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, base_out: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Computes y = base(x) + scaling c Σ_i u_i B_iᵀ - scaling (xd A0ᵀ) B0ᵀ, and z; mask: in place of rng's."""
    A, B = A.to(x.dtype), B.to(x.dtype)
    rows, heads = x.reshape(-1, x.shape[-1]), len(B)
    shape = {"input": rows.shape, "latent": (len(rows), heads, len(A))}.get(site, (len(rows), heads, rows.shape[1]))
    if mask is None and dropout_p > 0 and rng is not None:
        mask = dropout_mask(rng, dropout_p, shape, x.dtype)
    mask = x.new_ones(shape) if mask is None else mask.reshape(shape)
    xd = rows * mask if site == "input" else rows
    z = (rows[:, None] * mask) @ A.T if site == "input_per_head" else xd @ A.T
    latents = z if z.dim() == 3 else z[:, None].expand(-1, heads, -1)
    u = latents * mask if site == "latent" else latents
    low = torch.einsum("tid,iod->to", u, B) / (heads if reduce == "mean" else 1)
    if A0 is not None and B0 is not None:
        low = low - xd @ A0.to(x.dtype).T @ B0.to(x.dtype).T
    base = torch.nn.functional.linear(x, weight, bias) if weight is not None else base_out
    assert base is not None
    return base + scaling * low.reshape(base.shape), z.to(torch.promote_types(z.dtype, torch.float32))
