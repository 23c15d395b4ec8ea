"""Alignment of the tasks' latents over all adapted layers of a model: moments, one value, the gradient in each latent.

All layers take one call each for moments, tables and gradients: 4 kernel launches on a GPU. Layers of one model may be
on several devices; then moments and gradients take one call a device.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.ops import gaussian_kl_tables, task_moments
from align_ext.ops.gaussian_kl import gaussian_kl_backward


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
    if config.align_layers == "mean":
        return Alignment(per_layer.mean(), per_layer, 1 / len(per_layer), tables)
    return Alignment(per_layer.sum(), per_layer, 1.0, tables)


class TokenTasks:
    """The task of every token, from ids of samples or of tokens, and what all layers' latents give with it.

    Latents are a dictionary of [T, rank] by slot, the layer's place in the model.
    """

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids  # int64 [B] or [B, S]
        self._expanded: dict[tuple[torch.device, int], Tensor] = {}

    def check(self, tokens: int) -> None:
        """Raises RuntimeError if a layer cannot have seen so many tokens."""
        count = self.ids.numel()
        if count != tokens and (count == 0 or tokens % count):
            raise RuntimeError(
                f"task_ids holds {count} ids, but an aligned layer saw {tokens} tokens: give one id per sample, [B], "
                "or one per token, [B, S], of a batch-first model all of whose adapted layers see the same tokens"
            )

    def expand(self, device: torch.device, tokens: int) -> Tensor:
        """int64 [T]: the ids as they are, or each of [B] repeated over its S = T / B positions; made once."""
        if (device, tokens) not in self._expanded:
            ids = self.ids.reshape(-1)
            ids = ids if len(ids) == tokens else ids.repeat_interleave(tokens // len(ids), output_size=tokens)
            self._expanded[device, tokens] = ids.to(device)
        return self._expanded[device, tokens]

    def _groups(self, latents: dict[int, Tensor]) -> list[tuple[list[int], list[Tensor], Tensor]]:
        """Slots, latents and token ids of the layers that one call serves, as a rule all of them."""
        groups: dict[tuple[torch.device, int, torch.dtype], list[int]] = {}
        for slot in sorted(latents):
            z = latents[slot]
            groups.setdefault((z.device, len(z), z.dtype), []).append(slot)
        return [
            (slots, [latents[slot] for slot in slots], self.expand(device, tokens))
            for (device, tokens, _), slots in groups.items()
        ]

    def moments(self, latents: dict[int, Tensor], layers: int, tasks: int, rank: int) -> Tensor:
        """Computes n | mean | M2, [layers, tasks, 2 rank + 1]; zero for layers without a latent."""
        groups = self._groups(latents)
        parts = [task_moments(z, ids, tasks, rank=rank) for _, z, ids in groups]
        if len(parts) == 1 and len(parts[0]) == layers:
            return parts[0]
        dtype = max((part.dtype for part in parts), key=lambda dtype: dtype.itemsize, default=torch.float32)
        moments = torch.zeros((layers, tasks, 2 * rank + 1), dtype=dtype, device=self.ids.device)
        for (slots, _, _), part in zip(groups, parts, strict=True):
            moments[slots] = part.to(moments)
        return moments

    def gradients(self, latents: dict[int, Tensor], tables: Tensor, d_align: Tensor, scale: float) -> dict[int, Tensor]:
        """Computes dz of each latent, scale * d_align times what the tables of all layers say."""
        gradients: dict[int, Tensor] = {}
        for slots, z, ids in self._groups(latents):
            own = tables if len(slots) == len(tables) else tables[slots]
            dz = gaussian_kl_backward(d_align.to(ids.device), z, ids, own.to(ids.device), scale=scale)
            gradients |= zip(slots, dz, strict=True)
        return gradients


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
