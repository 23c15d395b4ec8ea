"""The oracle of align_ext/ops/routed_lora.py."""

import torch
from torch import Tensor

from align_ext.reference.philox import dropout_mask


def _weights(logits: Tensor, top_k: int) -> Tensor:
    """Softmax over the last dimension's top_k largest, ties to the lowest index; 0 elsewhere."""
    order = logits.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order[..., :top_k], value=True)
    return logits.masked_fill(~chosen, float("-inf")).softmax(dim=-1)


def routed_lora(
    x: Tensor, A: Tensor, B: Tensor, R: Tensor, scaling: float = 1.0, *, top_k: int | None = None, tau: float = 1.0,
    site: str = "input", dropout_p: float = 0.0, rng: Tensor | None = None, A0: Tensor | None = None,
    B0: Tensor | None = None, weight: Tensor | None = None, bias: Tensor | None = None, base_out: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Computes y = base(x) + scaling Σ_i w_i u_i B_iᵀ - scaling (xd A0ᵀ) B0ᵀ, z and w; mask: as in dropout_sum."""
    A, B, R = A.to(x.dtype), B.to(x.dtype), R.to(x.dtype)
    rows, heads, rank, n = x.reshape(-1, x.shape[-1]), len(B), B.shape[-1], x.shape[-1]
    groups = len(R) // heads
    acc = torch.promote_types(x.dtype, torch.float32)
    w = _weights((rows @ R.T).to(acc).unflatten(-1, (groups, heads)) / tau, top_k or heads)
    shape = {"input": (len(rows), 1, n), "latent": (len(rows), heads, rank)}.get(site, (len(rows), heads, n))
    if mask is None and dropout_p > 0 and rng is not None:
        mask = dropout_mask(rng, dropout_p, shape, x.dtype)
    mask = x.new_ones(shape) if mask is None else mask.reshape(shape)
    xd = rows[:, None] * mask if site in ("input", "input_per_head") else rows[:, None]
    head_inputs = xd.expand(-1, heads, -1) if A.dim() == 3 else xd
    z = torch.einsum("tin,irn->tir", head_inputs, A) if A.dim() == 3 else head_inputs @ A.T
    u = (z * mask if site == "latent" else z).expand(-1, heads, -1)
    low = torch.einsum("tki,tid,ikod->tko", w.to(x.dtype), u, B.unflatten(1, (groups, -1))).flatten(1)
    if A0 is not None and B0 is not None:
        offset = xd[:, 0] if site == "input" else rows
        low = low - offset @ A0.to(x.dtype).T @ B0.to(x.dtype).T
    base = torch.nn.functional.linear(x, weight, bias) if weight is not None else base_out
    assert base is not None
    z = z[:, 0] if A.dim() == 2 and site != "input_per_head" else z
    return base + scaling * low.reshape(base.shape), z.to(acc), w
