"""Philox4x32-10 (Salmon et al., SC 2011) in int64 arithmetic; native version: csrc/ops/philox.h."""

import torch
from torch import Tensor

_MASK32 = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the high and low 32 bits of a * b for 32-bit a and b; b is split, so that nothing exceeds 63 bits."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = low + ((high & 0xFFFF) << 16)
    return (high >> 16) + (total >> 32) & _MASK32, total & _MASK32


def philox(seed: int, block: Tensor, offset: int) -> Tensor:
    """Computes the four 32-bit words of each block.

    Args:
        seed: the 64-bit key.
        block: int64, any shape; the low half of the counter.
        offset: the high half of the counter.

    Returns:
        int64 [*block.shape, 4].
    """
    c0, c1 = block & _MASK32, (block >> 32) & _MASK32
    c2, c3 = (torch.full_like(block, (offset >> shift) & _MASK32) for shift in (0, 32))
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK32, (k1 + _WEYL[1]) & _MASK32
    return torch.stack([c0, c1, c2, c3], dim=-1)


def dropout_mask(rng: Tensor, p: float, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Computes the dropout mask of a tensor, scaled by 1 / (1 - p'), p' = round(65536 p) / 65536.

    Args:
        rng: int64 [2] (seed, offset).
        p: probability of dropping.
        shape: the shape of the tensor; element e in row-major order has block e // 8, 16-bit lane e % 8.
        dtype: the dtype of the mask.
    """
    count = torch.Size(shape).numel()
    threshold = int(p * 65536 + 0.5)
    words = philox(int(rng[0]), torch.arange((count + 7) // 8), int(rng[1]))
    lanes = torch.stack([words & 0xFFFF, words >> 16], dim=-1).reshape(-1)[:count]
    mask = (lanes >= threshold).to(dtype)
    return (mask * (65536 / (65536 - threshold))).reshape(shape).to(rng.device)
