"""Alignment of the tasks' latents over all adapted layers of a model: one value and the tables of its gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.ops import gaussian_kl_tables


@dataclass(frozen=True)
class Alignment:
    """What one evaluation gives.

    Attributes:
        value: scalar, the mean (or sum) over the layers.
        per_layer: [layers].
        share: of one layer's loss in the value, 1 / layers for the mean.
        tables: [layers, tasks, 3 rank] = a | b | mu: d value / d z_t = share * (a[task] + b[task] * (z_t - mu[task])).
    """

    value: Tensor
    per_layer: Tensor
    share: float
    tables: Tensor


def align_kl(moments: Tensor, config: AlignLoraConfig) -> Alignment:
    """Evaluates the Gaussian KL (Align-LoRA, eq. 5) of every layer from its moments.

    Args:
        moments: [layers, tasks, 2 rank + 1] = n | mean | M2; dimensions that a layer lacks are zero and add nothing.
        config: align_eps, align_ddof, align_pairs, align_layers.
    """
    per_layer, tables = gaussian_kl_tables(
        moments, eps=config.align_eps, ddof=config.align_ddof, pairs=config.align_pairs
    )
    share = 1 / len(per_layer) if config.align_layers == "mean" else 1.0
    return Alignment(per_layer.sum() * share, per_layer, share, tables)


def merge_moments(first: Tensor, second: Tensor) -> Tensor:
    """Merges two sets of moments n | mean | M2 [..., 2 rank + 1] of disjoint tokens (Chan et al. 1979)."""
    rank = first.shape[-1] // 2
    n1, mean1, m1 = first.split([1, rank, rank], dim=-1)
    n2, mean2, m2 = second.split([1, rank, rank], dim=-1)
    n = n1 + n2
    delta, share = mean2 - mean1, n2 / n.clamp_min(1)
    return torch.cat([n, mean1 + delta * share, m1 + m2 + delta * delta * n1 * share], dim=-1)


def task_divergences(moments: Tensor, config: AlignLoraConfig) -> Tensor:
    """The KL of each pair of tasks, averaged (or summed) over the layers; for reports, in float64.

    Args:
        moments: [layers, tasks, 2 rank + 1] = n | mean | M2.
        config: align_eps, align_ddof, align_pairs, align_layers.

    Returns:
        [tasks, tasks], symmetric, 0 on the diagonal and for pairs with an inactive task.
    """
    rank = moments.shape[-1] // 2
    n, mean, m2 = moments.double().split([1, rank, rank], dim=-1)
    v = m2 / (n - config.align_ddof).clamp_min(1) + config.align_eps
    p = 1 / v
    vi, vj, pi, pj = v[:, :, None], v[:, None], p[:, :, None], p[:, None]
    gap = (mean[:, :, None] - mean[:, None]) ** 2
    divergence = 0.25 * (vi * pj + vj * pi - 2 + gap * (pi + pj)).sum(-1)
    active = (n[..., 0] >= max(2, 1 + config.align_ddof)).double()
    divergence = divergence * active[:, :, None] * active[:, None]
    if config.align_pairs == "mean":
        count = active.sum(1)[:, None, None]
        divergence = divergence / (count * (count - 1) / 2).clamp_min(1)
    return divergence.mean(0) if config.align_layers == "mean" else divergence.sum(0)
