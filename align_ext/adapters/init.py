"""First values of adapters. Every one of them starts as no change of the model: B A = 0, or an offset takes it off."""

import math

import torch
from torch import Tensor, nn


def kaiming(A: Tensor, B: Tensor) -> None:
    """A ~ U(-1/sqrt n, 1/sqrt n) (Kaiming, a = sqrt 5), B = 0: PEFT's default. A [..., r, n], B [..., m, r]."""
    uniform(A)
    nn.init.zeros_(B)


def uniform(matrices: Tensor) -> None:
    """Each of the matrices [..., m, n] ~ U(-1/sqrt n, 1/sqrt n): Kaiming's with a = sqrt 5, nn.Linear's start."""
    for matrix in matrices.view(-1, *matrices.shape[-2:]):
        nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))


def gaussian(A: Tensor, B: Tensor) -> None:
    """A ~ N(0, 1/r²), B = 0: PEFT's "gaussian"."""
    nn.init.normal_(A, std=1 / A.shape[-2])
    nn.init.zeros_(B)


def orthogonal(A: Tensor, B: Tensor) -> None:
    """A = 0.1 P X and B_i = 0.1 Y_i Q with orthonormal rows of P and Q, P Qᵀ = 0: no product B_i A, yet no zeros.

    PEFT's "orthogonal", for any number of heads: X [r/2, n] and Y_i [m, r/2] are random, P [r/2, r]ᵀ and Q the two
    halves of the rows of one orthogonal matrix.
    """
    r = A.shape[-2]
    rows = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
    P, Q = rows[0::2].to(A), rows[1::2].to(B)
    with torch.no_grad():
        A.copy_(0.1 * P.T @ torch.randn(*A.shape[:-2], r // 2, A.shape[-1]).to(A))
        B.copy_(0.1 * torch.randn(*B.shape[:-1], r // 2).to(B) @ Q)


def random_heads(A: Tensor, B: Tensor, gamma: float) -> None:
    """A ~ c N(0, 1/n), B_i ~ c N(0, 1/m), c = m^(1/4) / sqrt(gamma) (R-LoRA, 2502.15455, Table 1)."""
    c = B.shape[-2] ** 0.25 / math.sqrt(gamma)
    nn.init.normal_(A, std=c / math.sqrt(A.shape[-1]))
    nn.init.normal_(B, std=c / math.sqrt(B.shape[-2]))


def pissa(A: Tensor, B: Tensor, weight: Tensor, scaling: float) -> None:
    """B A = the r largest singular directions of W / scaling: U sqrt(S), sqrt(S) Vᵀ (PiSSA, 2404.02948)."""
    r = A.shape[0]
    if weight.is_meta or weight.dim() != 2:
        raise ValueError('init_lora_weights="pissa" needs the base weight in memory and in a floating-point dtype')
    U, S, V = torch.linalg.svd(
        weight.detach().to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False
    )
    root = (S[:r] / scaling).sqrt()
    with torch.no_grad():
        B.copy_(U[:, :r] * root)
        A.copy_(root[:, None] * V[:r])


def nystrom(A: Tensor, B: Tensor, N: Tensor, weight: Tensor) -> None:
    """A = W[:r], B = W[:, :r], N = W[:r, :r]: NLoRA's (2502.14482, released code)."""
    r = A.shape[0]
    if weight.is_meta or weight.dim() != 2:
        raise ValueError('init_lora_weights="nystrom" needs the base weight in memory and in a floating-point dtype')
    for tensor, part in ((A, weight[:r]), (B, weight[:, :r]), (N, weight[:r, :r])):
        tensor.copy_(part.detach())


FROM_WEIGHT = ("pissa", "nystrom")  # starts that need the base weight
ZERO_PRODUCT = {"kaiming": kaiming, "gaussian": gaussian, "orthogonal": orthogonal}  # starts with B A = 0


def each(kind: str, A: Tensor, B: Tensor) -> None:
    """Starts every pair of A [N, r, n] and B [N, m, r] by itself."""
    for pair in zip(A, B, strict=True):
        ZERO_PRODUCT[kind](*pair)
