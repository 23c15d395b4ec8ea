"""The Gaussian KL alignment loss (Align-LoRA, 2508.05078, eq. 5) of all adapted layers: moments, value, gradients.

Moments, tables and gradients are one call each for all layers: 4 kernel launches on a GPU. If the layers of a model are
on several devices, moments and gradients are one call per device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.losses.tokens import Latents, TokenTasks, gather, heads_of, layer_value, pair_factor
from align_ext.ops import gaussian_kl_tables, task_moments
from align_ext.ops.gaussian_kl import gaussian_kl_backward


@dataclass(frozen=True)
class KlStatistics:
    """The moments of the tasks' tokens.

    Attributes:
        moments: [layers * latents per layer, tasks, 2 rank + 1] = n | mean | M2; dimensions that a layer lacks are
            zero and add nothing.
        latents: how many latents a layer has: 1, or N if each head has its own.
        positions: S with statistics "position" (rank is then S times the rank of the layers), else 1.
    """

    moments: Tensor
    latents: int = 1
    positions: int = 1

    @classmethod
    def of(
        cls, latents: Latents, tokens: TokenTasks, sizes: tuple[int, int, int], config: AlignLoraConfig
    ) -> KlStatistics:
        """Returns the statistics of one forward pass in this process.

        Args:
            latents: the latents of the layers that ran.
            tokens: the tasks of their tokens.
            sizes: the number of layers, the number of tasks, the largest rank of a layer.
            config: the options; align_statistics is read.
        """
        layers, tasks, rank = sizes
        positions = _count_positions(latents, tokens) if config.align_statistics == "position" else 1
        rank *= positions
        per_layer = config.latents
        groups = _group_layers(latents, tokens, positions)
        by_group = [task_moments(z, ids, tasks, rank=rank) for _, z, ids in groups]
        if len(by_group) == 1 and len(groups[0][0]) == layers:
            return cls(by_group[0], per_layer, positions)
        dtype = max((group.dtype for group in by_group), key=lambda dtype: dtype.itemsize, default=torch.float32)
        moments = torch.zeros((layers, per_layer, tasks, 2 * rank + 1), dtype=dtype, device=tokens.ids.device)
        for (numbers, _, _), group in zip(groups, by_group, strict=True):
            moments[numbers] = group.to(moments).unflatten(0, (-1, per_layer))
        return cls(moments.flatten(0, 1), per_layer, positions)

    def merge(self, other: KlStatistics) -> KlStatistics:
        """Returns the statistics of both sets of tokens together."""
        if self.positions != other.positions:
            raise RuntimeError(
                f'align_statistics="position" met {self.positions} and {other.positions} positions: pad all processes '
                'and micro-batches to one length, or use align_statistics="token"'
            )
        return replace(self, moments=merge_moments(self.moments, other.moments))

    tokens = 0  # not counted: the gradient of a token depends only on the moments and on the token itself

    def after(self, tokens: int) -> KlStatistics:
        """Returns these statistics for tokens that follow so many other tokens of this process."""
        return self

    def over_processes(self) -> KlStatistics:
        """Returns the statistics of all processes: one collective, merged in rank order, so that all bits agree."""
        return replace(self, moments=functools.reduce(merge_moments, gather(self.moments)))

    def evaluate(self, config: AlignLoraConfig) -> KlAlignment:
        """Computes the loss of every layer and its gradient tables."""
        pairs, factor = pair_factor(config.align_pairs, self.moments.shape[1])
        per_latent, tables = gaussian_kl_tables(self.moments, eps=config.align_eps, ddof=config.align_ddof, pairs=pairs)
        factor /= self.positions
        per_latent = per_latent if factor == 1 else per_latent * factor
        value, per_layer, latent_weight = layer_value(per_latent, self.latents, config.align_layers)
        return KlAlignment(value, per_layer, latent_weight * factor, tables, self)

    def pairs(self, config: AlignLoraConfig) -> Tensor:
        """Returns the number of pairs of tasks with enough tokens, averaged over the latents; scalar."""
        active = (self.moments[..., 0] >= max(2, 1 + config.align_ddof)).sum(1)
        return (active * (active - 1) / 2).mean()

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns all contents as tensors, to be stored."""
        return {"moments": self.moments, "sizes": torch.tensor([self.latents, self.positions])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> KlStatistics:
        """The inverse of to_tensors."""
        latents, positions = tensors["sizes"].tolist()
        return cls(tensors["moments"], latents, positions)

    def per_task(self, config: AlignLoraConfig) -> list[float]:
        """The divergence of each task from all others, averaged (or summed) over the layers; for reports."""
        return (task_divergences(self.moments, config, self.latents).sum(1) / self.positions).tolist()


@dataclass(frozen=True)
class KlAlignment:
    """The alignment loss computed from statistics.

    Attributes:
        value: scalar, the mean (or sum) over the layers.
        per_layer: [layers], the loss of each layer.
        latent_weight: the weight of one latent's loss in the value.
        tables: [layers * latents, tasks, 3 rank] = a | b | mu, for the loss of one latent:
            d loss / d z_t = a[task] + b[task] * (z_t - mu[task]).
        statistics: the statistics that were evaluated.
    """

    value: Tensor
    per_layer: Tensor
    latent_weight: float
    tables: Tensor
    statistics: KlStatistics

    def gradients(self, latents: Latents, tokens: TokenTasks, d_align: Tensor, scale: float) -> Latents:
        """Computes scale * d_align * d value / d z for latents of this process."""
        gradients: Latents = {}
        per_layer, positions = self.statistics.latents, self.statistics.positions
        for numbers, z, ids in _group_layers(latents, tokens, positions):
            tables = self.tables
            if len(z) != len(tables):
                tables = tables.unflatten(0, (-1, per_layer))[numbers].flatten(0, 1)
            d_here, tables = d_align.to(ids.device), tables.to(ids.device)
            dz = gaussian_kl_backward(d_here, z, ids, tables, scale=scale * self.latent_weight)
            for i, layer in enumerate(numbers):
                heads = dz[i * per_layer : (i + 1) * per_layer]
                gradient = torch.stack(heads, 1) if latents[layer].dim() == 3 else heads[0]
                gradients[layer] = gradient if positions == 1 else gradient.view(latents[layer].shape)
        return gradients


def _count_positions(latents: Latents, tokens: TokenTasks) -> int:
    """Returns S, which is the same for all layers; the ids must be one per sample."""
    counts = {len(z) for z in latents.values()}
    if tokens.ids.dim() != 1 or len(counts) > 1:
        raise RuntimeError(
            'align_statistics="position" needs one task id per sample, [B], of an unpacked batch whose layers all see '
            f"B * S tokens; got ids {list(tokens.ids.shape)} for {sorted(counts)} tokens"
        )
    return next(iter(counts), 1) // max(len(tokens.ids), 1)


def _group_layers(latents: Latents, tokens: TokenTasks, positions: int) -> list[tuple[list[int], list[Tensor], Tensor]]:
    """Groups the layers that one call can process (usually all): layer numbers, latents, token ids."""
    groups: dict[tuple[torch.device, int, torch.dtype, int], list[int]] = {}
    for layer in sorted(latents):
        z = latents[layer]
        groups.setdefault((z.device, z.shape[0], z.dtype, id(tokens.of(layer))), []).append(layer)
    result = []
    for (device, count, _, _), numbers in groups.items():
        rows = count // positions
        heads = [head for layer in numbers for head in heads_of(latents[layer])]
        heads = heads if positions == 1 else [head.reshape(rows, -1) for head in heads]
        result.append((numbers, heads, tokens.of(numbers[0]).expand(device, rows)))
    return result


def merge_moments(first: Tensor, second: Tensor) -> Tensor:
    """Merges two sets of moments n | mean | M2 [..., 2 rank + 1] of disjoint tokens (Chan et al. 1979)."""
    rank = first.shape[-1] // 2
    n1, mean1, m1 = first.split([1, rank, rank], dim=-1)
    n2, mean2, m2 = second.split([1, rank, rank], dim=-1)
    n = n1 + n2
    delta, share = mean2 - mean1, n2 / n.clamp_min(1)
    return torch.cat([n, mean1 + delta * share, m1 + m2 + delta * delta * n1 * share], dim=-1)


def task_divergences(moments: Tensor, config: AlignLoraConfig, latents: int = 1) -> Tensor:
    """Returns each pair's part of the loss, averaged (or summed) over the layers; for reports, in float64.

    Args:
        moments: [layers * latents, tasks, 2 rank + 1] = n | mean | M2.
        config: the options; align_eps, align_ddof, align_pairs and align_layers are read.
        latents: how many latents a layer has; the divergence of a layer is their mean.

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
    pairs, factor = pair_factor(config.align_pairs, n.shape[1])
    if pairs == "mean":
        count = active.sum(1)[:, None, None]
        divergence = divergence * factor / (count * (count - 1) / 2).clamp_min(1)
    divergence = divergence.unflatten(0, (-1, latents)).mean(1)
    return divergence.mean(0) if config.align_layers == "mean" else divergence.sum(0)
