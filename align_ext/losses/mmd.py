"""The multi-kernel MMD alignment loss (Align-LoRA-M, 2508.05078) of all adapted layers: rows, value, gradients.

Value and gradients are one call each for all layers: 8 kernel launches on a GPU. If the layers of a model are on
several devices, they are one call per device.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.losses.tokens import Latents, TokenTasks, gather, heads_of, layer_value, pair_factor
from align_ext.ops.mk_mmd import mk_mmd_backward, mk_mmd_rows


@dataclass(frozen=True)
class MmdStatistics:
    """The latents of all tokens, including those of other processes.

    Attributes:
        rows: for each layer, [latents per layer, K, rank]; views of the layers' latents as long as nothing is added.
        ids: int64 [K], the task of each of the K tokens.
        start: the index of this process's first token among them.
        tasks: the number of tasks.
    """

    rows: dict[int, Tensor]
    ids: Tensor
    start: int
    tasks: int

    @classmethod
    def of(
        cls, latents: Latents, tokens: TokenTasks, sizes: tuple[int, int, int], config: AlignLoraConfig
    ) -> MmdStatistics:
        """Returns the statistics of one forward pass in this process; arguments as in KlStatistics.of."""
        counts = {len(z) for z in latents.values()}
        if len(counts) > 1:
            raise RuntimeError(f'align="mmd" needs layers that see the same tokens, got {sorted(counts)} of them')
        ids = tokens.expand(tokens.ids.device, next(iter(counts), 0))
        return cls({layer: _by_head(latents[layer]) for layer in sorted(latents)}, ids, 0, sizes[1])

    def merge(self, other: MmdStatistics) -> MmdStatistics:
        """Returns the statistics of both sets of tokens together, first the tokens of self."""
        rows = {layer: torch.cat([z, other.rows[layer].to(z)], 1) for layer, z in self.rows.items()}
        return replace(self, rows=rows, ids=torch.cat([self.ids, other.ids]))

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return len(self.ids)

    def after(self, tokens: int) -> MmdStatistics:
        """Returns these statistics for tokens that follow so many other tokens of this process."""
        return replace(self, start=self.start + tokens)

    def over_processes(self) -> MmdStatistics:
        """Returns the statistics of all processes in rank order: one collective for all layers, one for the ids."""
        counts = gather(torch.tensor([len(self.ids)], device=self.ids.device))
        longest, sizes = int(torch.cat(counts).max()), [int(count) for count in counts]
        flat = [z.movedim(1, 0).flatten(1) for z in self.rows.values()]  # [K, latents * rank] of each layer
        packed = torch.cat([z.to(self.ids.device) for z in flat], 1)
        gathered = gather(_pad_rows(packed, longest))
        ids = gather(_pad_rows(self.ids, longest))
        joined = torch.cat([padded[:size] for padded, size in zip(gathered, sizes, strict=True)])
        rows = {}
        for (layer, z), layer_rows in zip(self.rows.items(), joined.split([z.shape[1] for z in flat], 1), strict=True):
            rows[layer] = layer_rows.unflatten(1, (z.shape[0], z.shape[2])).movedim(1, 0).to(z)
        all_ids = torch.cat([padded[:size] for padded, size in zip(ids, sizes, strict=True)])
        return replace(self, rows=rows, ids=all_ids, start=sum(sizes[: dist.get_rank()]))

    def evaluate(self, config: AlignLoraConfig) -> MmdAlignment:
        """Computes the loss of every layer and its gradient in the rows that take part."""
        _, factor = pair_factor(config.align_pairs, self.tasks)
        groups = [(layers, *self._evaluate(layers, self.ids, config)) for layers in self._group_layers()]
        losses = self._in_order([(layers, loss) for layers, loss, *_ in groups]) * factor
        value, per_layer, latent_weight = layer_value(losses, config.latents, config.align_layers)
        gradients = [(layers, gradient, slot) for layers, _, gradient, slot in groups]
        return MmdAlignment(value, per_layer, latent_weight * factor, gradients, self)

    def _group_layers(self) -> list[list[int]]:
        """Groups the layers that one call can process (usually all)."""
        groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
        for layer, z in self.rows.items():
            groups.setdefault((z.device, z.dtype), []).append(layer)
        return list(groups.values())

    def _evaluate(self, layers: list[int], ids: Tensor, config: AlignLoraConfig) -> tuple[Tensor, Tensor, Tensor]:
        """Returns what mk_mmd_rows does for the latents of layers on one device."""
        latents = [z for layer in layers for z in self.rows[layer].unbind(0)]
        return mk_mmd_rows(latents, ids.to(latents[0].device), self.tasks, **_options(config))

    def _in_order(self, losses: list[tuple[list[int], Tensor]]) -> Tensor:
        """Returns the losses of all latents, [layers * latents per layer], of those of groups of layers."""
        if len(losses) == 1:
            return losses[0][1].to(self.ids.device)
        by_layer: dict[int, Tensor] = {}
        for layers, loss in losses:
            by_layer |= zip(layers, loss.to(self.ids.device).unflatten(0, (len(layers), -1)), strict=True)
        return torch.cat([by_layer[layer] for layer in self.rows])

    def pairs(self, config: AlignLoraConfig) -> Tensor:
        """Returns the number of pairs of tasks with enough tokens; scalar."""
        counts = torch.bincount(self.ids[self.ids >= 0], minlength=self.tasks)
        active = (counts >= 2).sum()
        return active * (active - 1) / 2

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns all contents as tensors, to be stored."""
        rows = {f"rows.{layer}": z.contiguous() for layer, z in self.rows.items()}
        return rows | {"ids": self.ids, "sizes": torch.tensor([self.start, self.tasks])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> MmdStatistics:
        """The inverse of to_tensors."""
        start, tasks = tensors["sizes"].tolist()
        layers = sorted(int(name.removeprefix("rows.")) for name in tensors if name.startswith("rows."))
        return cls({layer: tensors[f"rows.{layer}"] for layer in layers}, tensors["ids"], start, tasks)

    def per_task(self, config: AlignLoraConfig) -> list[float]:
        """Returns each task's part of the loss: that of its pairs with all others; for reports."""
        per_task = [0.0] * self.tasks
        how, factor = pair_factor(config.align_pairs, self.tasks)
        weight = factor / max(float(self.pairs(config)), 1.0) if how == "mean" else 1.0
        for i, j in itertools.combinations(range(self.tasks), 2):
            pair = torch.where((self.ids == i) | (self.ids == j), self.ids, -1)
            losses = self._in_order(
                [(layers, self._evaluate(layers, pair, config)[0]) for layers in self._group_layers()]
            )
            value = weight * float(layer_value(losses, config.latents, config.align_layers)[0])
            per_task[i] += value
            per_task[j] += value
        return per_task


@dataclass(frozen=True)
class MmdAlignment:
    """The alignment loss computed from statistics.

    Attributes:
        value: scalar, the mean (or sum) over the layers.
        per_layer: [layers], the loss of each layer.
        latent_weight: the weight of one latent's loss in the value.
        of_rows: for layers of one device, gradient and slot of mk_mmd_rows, of the loss of one latent.
        statistics: the statistics that were evaluated.
    """

    value: Tensor
    per_layer: Tensor
    latent_weight: float
    of_rows: list[tuple[list[int], Tensor, Tensor]]
    statistics: MmdStatistics

    def gradients(self, latents: Latents, tokens: TokenTasks, d_align: Tensor, scale: float) -> Latents:
        """Computes scale * d_align * d value / d z for latents of this process."""
        gradients: Latents = {}
        start, weight = self.statistics.start, scale * self.latent_weight
        for layers, gradient, slot in self.of_rows:
            heads = {layer: heads_of(latents[layer]) for layer in layers}
            like = [z for layer in layers for z in heads[layer]]
            d_loss = (d_align.to(like[0]) * weight).expand(len(like))
            ranks = [z.shape[1] for z in like]
            dz = iter(mk_mmd_backward(d_loss, gradient, slot[start : start + len(like[0])], ranks, like[0].dtype))
            for layer in layers:
                of_heads = [next(dz) for _ in heads[layer]]
                gradients[layer] = torch.stack(of_heads, 1) if latents[layer].dim() == 3 else of_heads[0]
        return gradients


def _by_head(z: Tensor) -> Tensor:
    """A view [latents per layer, T, rank] of a layer's latents."""
    return z.movedim(1, 0) if z.dim() == 3 else z[None]


def _options(config: AlignLoraConfig) -> dict[str, Any]:
    return {
        "bandwidths": config.mmd_bandwidths or "heuristic",
        "num_kernels": config.mmd_kernels,
        "statistic": config.mmd_statistic,
        "n_max": config.mmd_n_max,
        "pairs": pair_factor(config.align_pairs, 0)[0],
    }


def _pad_rows(rows: Tensor, length: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(length - len(rows), *rows.shape[1:])])
