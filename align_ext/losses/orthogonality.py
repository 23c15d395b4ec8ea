"""AdaLoRA's regularisation (2303.10512): it keeps the triplets of a layer apart, so that each can be pruned."""

import torch
from torch import Tensor


def orthogonality(P: Tensor, Q: Tensor) -> Tensor:
    """Computes (||PᵀP - I||_F² + ||Q Qᵀ - I||_F²) / 2, the mean over the two matrices of a layer.

    The gradient of ||PᵀP - I||_F² is 4 P (PᵀP - I).

    Args:
        P: [m, r]; differentiable.
        Q: [r, n]; differentiable.

    Returns:
        A scalar of float32 (float64 for float64).
    """
    P, Q = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (P, Q))
    identity = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
    return ((P.T @ P - identity).square().sum() + (Q @ Q.T - identity).square().sum()) / 2
