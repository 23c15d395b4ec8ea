"""How routers distribute tokens over the heads."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from align_ext.diagnostics.record import Recording


@dataclass(frozen=True)
class Routing:
    """The weights of one layer's router over the counted tokens and its G groups of outputs.

    Attributes:
        entropy: mean over (token, group) of -Σ_i w_i log w_i, divided by log N: 1 = uniform, 0 = a single head
            (1 for a single head).
        importance: [N], mean of w_i; they add up to 1.
        load: [N], fraction of (token, group) whose largest weight is w_i, ties to the lowest i; they add up to 1.
    """

    entropy: float
    importance: Tensor
    load: Tensor


def routing(recording: Recording) -> dict[str, Routing]:
    """Measures the routers (entropy: mtLoRA, 2603.01526, Figure 1A, there in nats and not divided by log N).

    Args:
        recording: what record_adapters returned for a model with routers (hydra, r_lora, lora_moe, malora,
            mtlora, mixlora); of mixlora, the probabilities that its choice is made by.

    Returns:
        Module name -> Routing.

    Raises:
        ValueError: no layer has a router.
    """
    if not recording.weights:
        raise ValueError(
            "no layer has a router: routing is measured for hydra, r_lora, lora_moe, malora, mtlora and mixlora"
        )
    return {name: _routing(w.flatten(0, 1)) for name, w in recording.weights.items()}


def _routing(w: Tensor) -> Routing:
    """Returns the measures for weights [tokens * groups, N]."""
    heads = w.shape[1]
    entropy = torch.special.entr(w).sum(1).mean()
    load = torch.bincount(w.argmax(1), minlength=heads) / len(w)
    return Routing(float(entropy) / math.log(heads) if heads > 1 else 1.0, w.mean(0), load)
