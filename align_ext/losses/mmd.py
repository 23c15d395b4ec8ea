"""The multi-kernel MMD alignment (Align-LoRA-M, 2508.05078) of all adapted layers: rows, one value, the gradients."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.losses.tokens import Latents, TokenTasks, gather, heads_of, layer_value
from align_ext.ops import mk_mmd


@dataclass(frozen=True)
class MmdStatistics:
    """The latents themselves, those of other processes too.

    Attributes:
        rows: by layer, [latents of the layer, K, rank].
        ids: int64 [K], the task of each of the K tokens.
        start: where the tokens of this process begin among them.
        tasks: how many there are.
    """

    rows: dict[int, Tensor]
    ids: Tensor
    start: int
    tasks: int

    @classmethod
    def of(
        cls, latents: Latents, tokens: TokenTasks, sizes: tuple[int, int, int], config: AlignLoraConfig
    ) -> MmdStatistics:
        """The statistics of one forward on this process; arguments as of KlStatistics.of."""
        counts = {len(z) for z in latents.values()}
        if len(counts) > 1:
            raise RuntimeError(f'align="mmd" needs layers that see the same tokens, got {sorted(counts)} of them')
        ids = tokens.expand(tokens.ids.device, next(iter(counts), 0))
        return cls({layer: torch.stack(heads_of(latents[layer])) for layer in sorted(latents)}, ids, 0, sizes[1])

    def merge(self, other: MmdStatistics) -> MmdStatistics:
        """The statistics of both sets of tokens together, this one's first."""
        rows = {layer: torch.cat([z, other.rows[layer].to(z)], 1) for layer, z in self.rows.items()}
        return replace(self, rows=rows, ids=torch.cat([self.ids, other.ids]))

    @property
    def tokens(self) -> int:
        """How many there are."""
        return len(self.ids)

    def after(self, tokens: int) -> MmdStatistics:
        """These statistics for a process's tokens that come after others of its own."""
        return replace(self, start=self.start + tokens)

    def over_processes(self) -> MmdStatistics:
        """The statistics of all processes in rank order: one collective for all layers, one for the ids."""
        counts = gather(torch.tensor([len(self.ids)], device=self.ids.device))
        longest, sizes = int(torch.cat(counts).max()), [int(count) for count in counts]
        flat = [z.movedim(1, 0).flatten(1) for z in self.rows.values()]  # [K, latents * rank] of each layer
        packed = torch.cat([z.to(self.ids.device) for z in flat], 1)
        parts = gather(_padded(packed, longest))
        ids = gather(_padded(self.ids, longest))
        together = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        rows = {}
        for (layer, z), piece in zip(self.rows.items(), together.split([z.shape[1] for z in flat], 1), strict=True):
            rows[layer] = piece.unflatten(1, (z.shape[0], z.shape[2])).movedim(1, 0).to(z)
        joined = torch.cat([part[:size] for part, size in zip(ids, sizes, strict=True)])
        return replace(self, rows=rows, ids=joined, start=sum(sizes[: dist.get_rank()]))

    def evaluate(self, config: AlignLoraConfig) -> MmdAlignment:
        """The loss of every layer, and its gradient in every row."""
        losses, gradients = [], {}
        for layer, heads in self.rows.items():
            results = [_value_and_gradient(z, self.ids.to(z.device), self.tasks, config) for z in heads]
            losses += [loss.to(self.ids.device) for loss, _ in results]
            gradients[layer] = torch.stack([gradient for _, gradient in results], 1)
        value, per_layer, share = layer_value(torch.stack(losses), config.latents, config.align_layers)
        return MmdAlignment(value, per_layer, share, gradients, self)

    def to_tensors(self) -> dict[str, Tensor]:
        """Everything in it, to be stored."""
        rows = {f"rows.{layer}": z for layer, z in self.rows.items()}
        return rows | {"ids": self.ids, "sizes": torch.tensor([self.start, self.tasks])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> MmdStatistics:
        """The inverse of to_tensors."""
        start, tasks = tensors["sizes"].tolist()
        layers = sorted(int(name.removeprefix("rows.")) for name in tensors if name.startswith("rows."))
        return cls({layer: tensors[f"rows.{layer}"] for layer in layers}, tensors["ids"], start, tasks)

    def per_task(self, config: AlignLoraConfig) -> list[float]:
        """The discrepancy of each task from all others, each pair by itself; for reports."""
        per_task = [0.0] * self.tasks
        for i, j in itertools.combinations(range(self.tasks), 2):
            pair = torch.where((self.ids == i) | (self.ids == j), self.ids, -1)
            losses = [
                mk_mmd(z, pair.to(z.device), self.tasks, **_options(config)).to(pair.device)
                for heads in self.rows.values()
                for z in heads
            ]
            value = float(layer_value(torch.stack(losses), config.latents, config.align_layers)[0])
            per_task[i] += value
            per_task[j] += value
        return per_task


@dataclass(frozen=True)
class MmdAlignment:
    """The loss of some statistics.

    Attributes:
        value: scalar, the mean (or sum) over the layers.
        per_layer: [layers].
        share: of one latent's loss in the value.
        rows: by layer, [K, latents of the layer, rank], the gradient of one latent's loss.
        statistics: what was evaluated.
    """

    value: Tensor
    per_layer: Tensor
    share: float
    rows: dict[int, Tensor]
    statistics: MmdStatistics

    def gradients(self, latents: Latents, tokens: TokenTasks, d_align: Tensor, scale: float) -> Latents:
        """Computes scale * d_align * d value / d z for latents of this process."""
        start = self.statistics.start
        return {
            layer: self.rows[layer][start : start + len(z)].reshape(z.shape) * (d_align.to(z) * (scale * self.share))
            for layer, z in latents.items()
        }


def _options(config: AlignLoraConfig) -> dict[str, Any]:
    return {
        "bandwidths": config.mmd_bandwidths or "heuristic",
        "num_kernels": config.mmd_kernels,
        "statistic": config.mmd_statistic,
        "n_max": config.mmd_n_max,
        "pairs": config.align_pairs,
    }


@torch.enable_grad()
def _value_and_gradient(z: Tensor, ids: Tensor, tasks: int, config: AlignLoraConfig) -> tuple[Tensor, Tensor]:
    leaf = z.detach().requires_grad_()
    loss = mk_mmd(leaf, ids, tasks, **_options(config))
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def _padded(part: Tensor, length: int) -> Tensor:
    return torch.cat([part, part.new_zeros(length - len(part), *part.shape[1:])])
