"""The L2 penalty on the latents of all adapted layers: a control that shrinks latents and aligns nothing."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.losses.tokens import Latents, TokenTasks, gather, heads_of, layer_value


@dataclass(frozen=True)
class L2Statistics:
    """The squares of the tasks' latents.

        L = Σ_t |z_t|² / (n r), the mean square over the n tokens of any task and the r dimensions

    Attributes:
        sums: [layers * latents per layer, tasks, 2] = Σ |z_t|² over the task's tokens | their number times r; float64.
        latents: how many latents a layer has.
    """

    sums: Tensor
    latents: int

    @classmethod
    def of(
        cls, latents: Latents, tokens: TokenTasks, sizes: tuple[int, int, int], config: AlignLoraConfig
    ) -> L2Statistics:
        """Returns the statistics of one forward pass in this process; arguments as in KlStatistics.of."""
        layers, tasks, _ = sizes
        sums = torch.zeros(layers, config.latents, tasks, 2, dtype=torch.float64, device=tokens.ids.device)
        for layer, z in latents.items():
            ids = tokens.of(layer).expand(z.device, len(z))
            member = (ids[:, None] == torch.arange(tasks, device=z.device)).double()  # [T, tasks]
            counts = member.sum(0) * z.shape[-1]
            for number, head in enumerate(heads_of(z)):
                # A product would carry a NaN of a token that does not count into every task's sum.
                squares = torch.where(ids >= 0, head.double().square().sum(1), 0.0)
                sums[layer, number] = torch.stack([squares @ member, counts], 1).to(sums.device)
        return cls(sums.flatten(0, 1), config.latents)

    def merge(self, other: L2Statistics) -> L2Statistics:
        """Returns the statistics of both sets of tokens together."""
        return replace(self, sums=self.sums + other.sums)

    tokens = 0  # not counted: the gradient of a token depends on the token and on the number of all tokens alone

    def after(self, tokens: int) -> L2Statistics:
        """Returns these statistics for tokens that follow so many other tokens of this process."""
        return self

    def over_processes(self) -> L2Statistics:
        """Returns the statistics of all processes, added in rank order."""
        return replace(self, sums=functools.reduce(torch.add, gather(self.sums)))

    def evaluate(self, config: AlignLoraConfig) -> L2Alignment:
        """Computes the loss of every layer."""
        squares, count = self.sums.sum(1).unbind(1)
        count = count.clamp_min(1)
        value, per_layer, weight = layer_value(squares / count, self.latents, config.align_layers)
        return L2Alignment(value, per_layer, weight, count, self)

    def pairs(self, config: AlignLoraConfig) -> Tensor:
        """Returns 0, the number of pairs of tasks that it compares."""
        return self.sums.new_zeros(())

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns all contents as tensors, to be stored."""
        return {"sums": self.sums, "sizes": torch.tensor([self.latents])}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> L2Statistics:
        """The inverse of to_tensors."""
        return cls(tensors["sums"], int(tensors["sizes"]))

    def per_task(self, config: AlignLoraConfig) -> list[float]:
        """The mean square of each task's latents, averaged over the layers; for reports."""
        squares, count = self.sums.unbind(-1)
        return (squares / count.clamp_min(1)).mean(0).tolist()


@dataclass(frozen=True)
class L2Alignment:
    """The penalty computed from statistics.

    Attributes:
        value: scalar, the mean (or sum) over the layers.
        per_layer: [layers], the loss of each layer.
        latent_weight: the weight of one latent's loss in the value.
        count: [layers * latents], n r of each latent: d loss / d z_t = 2 z_t / (n r).
        statistics: the statistics that were evaluated.
    """

    value: Tensor
    per_layer: Tensor
    latent_weight: float
    count: Tensor
    statistics: L2Statistics

    def gradients(self, latents: Latents, tokens: TokenTasks, d_align: Tensor, scale: float) -> Latents:
        """Computes scale * d_align * d value / d z for latents of this process."""
        gradients: Latents = {}
        for layer, z in latents.items():
            count = self.count.view(-1, self.statistics.latents)[layer].to(z.device)
            factor = (2 * scale * self.latent_weight * d_align.to(z.device).double() / count).to(
                torch.promote_types(z.dtype, torch.float32)
            )
            counts = tokens.of(layer).expand(z.device, len(z)) >= 0
            shape = (-1, *[1] * (z.dim() - 1))
            gradient = z * (factor[:, None] if z.dim() == 3 else factor)
            gradients[layer] = torch.where(counts.view(shape), gradient, 0.0).to(z.dtype)
        return gradients
