"""Compares the logits of two models."""

import torch
from torch import Tensor

LARGEST_DIFFERENCE = 1e-4  # what rounding explains in float32 logits, relative to the largest logit
_IN_16_BITS = 0.05  # a weight or an activation is rounded by up to 2**-9, and errors add up over the layers


def largest_difference(dtype: torch.dtype) -> float:
    """Returns the relative difference of logits that rounding explains in a dtype."""
    return LARGEST_DIFFERENCE if dtype in (torch.float32, torch.float64) else _IN_16_BITS


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of two models' logits, relative to the largest expected logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def verdict(difference: float, *, passed: bool) -> str:
    """Returns how a comparison of logits ended, as commands print it."""
    return f"{'same logits' if passed else 'OTHER LOGITS'} (relative difference {difference:.1e})"
