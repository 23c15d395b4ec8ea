"""mtLoRA's spectral-aware regularisation (2603.01526): it penalises overlap between the heads of a layer."""

import torch
from torch import Tensor


def projectors(B: Tensor) -> Tensor:
    """Computes P_i = V exp(-Sigma / mean Sigma) Vᵀ of each head B_i = U Sigma Vᵀ; large singular directions count less.

    Uses eigh of the r x r matrices B_iᵀ B_i in float32 or higher, instead of an SVD of an m x r matrix.

    Args:
        B: [N, m, r].

    Returns:
        [N, r, r]; the identity for a head whose mean singular value is below 1e-12.
    """
    B = _accumulated(B.detach())
    squares, V = torch.linalg.eigh(B.mT @ B)
    sigma = squares.clamp_min(0).sqrt()
    mean = sigma.mean(1, keepdim=True)
    decay = torch.where(mean < 1e-12, torch.ones_like(sigma), torch.exp(-sigma / mean.clamp_min(1e-12)))
    return (V * decay[:, None]) @ V.mT


def overlap(B: Tensor, P: Tensor | None = None) -> Tensor:
    """Computes L = Σ_{i<j} ||B'_iᵀ B'_j||_F², B'_i = B_i P_i, P a constant; P = None: the identity ("uniform").

    All pairs are blocks of one [N r, N r] Gram matrix.

    Args:
        B: [N, m, r]; differentiable, dB_i = 2 (Σ_{j≠i} B'_j B'_jᵀ B'_i) P_i.
        P: [N, r, r], computed by projectors(B) at any earlier time.

    Returns:
        A scalar of float32 (float64 for float64).
    """
    B = _accumulated(B)
    Bp = B if P is None else B @ P.to(B.dtype)
    gram = torch.einsum("imr,jms->ijrs", Bp, Bp)
    return gram.square().sum((2, 3)).triu(1).sum()


def self_orthogonality(B: Tensor) -> Tensor:
    """Computes Σ_i ||B_iᵀ B_i - I||_F² / N, as mtLoRA's released code does; it compares no head with another."""
    B = _accumulated(B)
    gram = B.mT @ B
    return (gram - torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)).square().sum((1, 2)).mean()


def _accumulated(B: Tensor) -> Tensor:
    return B.to(torch.promote_types(B.dtype, torch.float32))
