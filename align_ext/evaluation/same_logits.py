"""Compares the logits of two models."""

from torch import Tensor

LARGEST_DIFFERENCE = 1e-4  # what rounding explains in float32 logits, relative to the largest logit


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of two models' logits, relative to the largest expected logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def verdict(difference: float, *, passed: bool) -> str:
    """Returns how a comparison of logits ended, as commands print it."""
    return f"{'same logits' if passed else 'OTHER LOGITS'} (relative difference {difference:.1e})"
