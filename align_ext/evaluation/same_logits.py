"""Whether two models compute the same logits."""

from __future__ import annotations

from torch import Tensor

LARGEST_DIFFERENCE = 1e-4  # of two models' float32 logits, relative to the largest logit: rounding and nothing else


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """The largest difference of two models' logits, relative to the largest expected one."""
    return float((logits - expected).abs().max() / expected.abs().max())
