"""Compares the logits of two models."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

LARGEST_DIFFERENCE = 1e-4  # what rounding explains in float32 logits, relative to the largest logit
_WITHOUT_WEIGHTS = 0.05  # where the weights that are computed with are not at hand: each is rounded by up to 2**-9


@torch.no_grad()
def rounding_difference(logits: Callable[[], Tensor], expected: Tensor, weights: Iterable[Tensor]) -> float:
    """Returns the relative difference of a model's logits that rounding of its weights explains.

    In 16 bits it is seen from the model itself: twice the difference that flipping the last bit of half of the weights
    makes, a whole unit where rounding makes up to half of one; the weights are put back to the bit.

    Args:
        logits: computes the logits of the model as it is.
        expected: what it computes.
        weights: those that may be rounded otherwise.
    """
    weights = [weight.data for weight in weights if weight.is_floating_point()]
    narrow = [weight for weight in weights if weight.element_size() == 2]
    if not narrow:
        return LARGEST_DIFFERENCE if weights else _WITHOUT_WEIGHTS

    def flip() -> None:
        for number, weight in enumerate(narrow):
            generator = torch.Generator(weight.device).manual_seed(number)
            bits = torch.randint(2, weight.shape, generator=generator, dtype=torch.int16, device=weight.device)
            weight.view(torch.int16).bitwise_xor_(bits)

    flip()
    try:
        return max(2 * relative_difference(logits(), expected), LARGEST_DIFFERENCE)
    finally:
        flip()


def relative_difference(logits: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of two models' logits, relative to the largest expected logit."""
    return float((logits - expected).abs().max() / expected.abs().max())


def verdict(difference: float, *, passed: bool) -> str:
    """Returns how a comparison of logits ended, as commands print it."""
    return f"{'same logits' if passed else 'OTHER LOGITS'} (relative difference {difference:.1e})"
