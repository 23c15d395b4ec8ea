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
    return (V * _decay(squares.clamp_min(0).sqrt())[:, None]) @ V.mT


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
    """Computes 1/N Σ_i ||w_i w_iᵀ * (B_iᵀ B_i - c_i² I)||_F², as mtLoRA's released code does.

    w_ik = exp(-sigma_ik / mean_k sigma_ik), where sigma_i1 >= sigma_i2 ... are the singular values of B_i, and
    c_i = ||B_i||_F / sqrt(r), both constants for the gradient. It compares no head with another, and weighs the columns
    of B_i, in their order, by the singular values in theirs. What the released code adds to means and norms to keep
    them off zero (1e-8) is left out: heads of zeros have w = 1.
    """
    B = _accumulated(B)
    gram = B.mT @ B
    with torch.no_grad():
        sigma = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt().flip(-1)
        w = _decay(sigma)
        mean_square = gram.diagonal(dim1=-2, dim2=-1).mean(-1)  # c²
        target = mean_square[:, None, None] * torch.eye(B.shape[-1], dtype=B.dtype, device=B.device)
    return (w[:, :, None] * w[:, None] * (gram - target)).square().sum((1, 2)).mean()


def _decay(sigma: Tensor) -> Tensor:
    """Computes exp(-Sigma / mean Sigma) of each head's singular values [N, r], 1 where their mean is below 1e-12."""
    mean = sigma.mean(1, keepdim=True)
    return torch.where(mean < 1e-12, torch.ones_like(sigma), torch.exp(-sigma / mean.clamp_min(1e-12)))


def _accumulated(B: Tensor) -> Tensor:
    return B.to(torch.promote_types(B.dtype, torch.float32))
