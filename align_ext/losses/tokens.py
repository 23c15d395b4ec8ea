"""The latents of each adapted layer, and the task of every token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

Latents = dict[int, Tensor]  # layer number -> z [T, rank], or [T, N, rank] with one latent per head


class TokenTasks:
    """The task of every token, from one id per sample or per token; a token with id -1 does not count."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids  # int64 [B] or [B, S]
        self._expanded: dict[tuple[torch.device, int], Tensor] = {}

    def of(self, layer: int) -> TokenTasks:
        """Returns the tasks of the tokens that a layer sees."""
        return self

    def check(self, tokens: int, layer: str = "") -> None:
        """Raises RuntimeError if a layer cannot have seen so many tokens."""
        count, ids = self.ids.numel(), self.ids
        if count == tokens or (ids.dim() == 1 and count and tokens % count == 0):
            return
        if ids.dim() == 2 and count and tokens % count == 0 and ids.shape[1] == 1:
            return
        raise RuntimeError(
            f"task_ids holds {count} ids, but an aligned layer saw {tokens} tokens{layer and f' ({layer})'}: give one "
            "id per sample, [B], or one per token, [B, S], of a batch-first model, and leave layers that see other "
            "tokens (images, routed experts, pooled ones) out by exclude_modules"
        )

    def expand(self, device: torch.device, tokens: int) -> Tensor:
        """Returns int64 [T]: the ids per token, or each of [B] repeated over its S = T / B positions; cached."""
        expanded = self._expanded.get((device, tokens))
        if expanded is None:
            ids = self.ids.reshape(-1)
            ids = ids if len(ids) == tokens else ids.repeat_interleave(tokens // len(ids), output_size=tokens)
            expanded = self._expanded[device, tokens] = ids.to(device)
        return expanded


class LayerTokens(TokenTasks):
    """The tasks of the tokens that most layers see, and of the tokens of each other layer."""

    def __init__(self, ids: Tensor, default: TokenTasks, others: Mapping[int, TokenTasks]) -> None:
        super().__init__(ids)
        self._default, self._others = default, others

    def of(self, layer: int) -> TokenTasks:
        """Returns the tasks of the tokens that a layer sees."""
        return self._others.get(layer, self._default)


def gather(tensor: Tensor) -> list[Tensor]:
    """Returns the tensors of all processes, which have one shape, in rank order: one collective."""
    tensors = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(tensors, tensor.contiguous())
    return tensors


def heads_of(z: Tensor) -> tuple[Tensor, ...]:
    """Returns the latents of one layer, [T, rank] each."""
    return z.unbind(1) if z.dim() == 3 else (z,)


def pair_factor(align_pairs: str, tasks: int) -> tuple[Literal["sum", "mean"], float]:
    """Returns how a kernel reduces the pairs of the tasks that are present, and the factor on its result.

    "sum" estimates eq. 5 of 2508.05078, the sum over all M (M - 1) / 2 pairs of the M tasks, by the mean over the pairs
    that a batch holds, so that its strength does not depend on how many tasks a batch holds.

    Args:
        align_pairs: "sum", "mean" over the pairs, or "batch", the sum over the batch's pairs.
        tasks: M.
    """
    if align_pairs == "batch":
        return "sum", 1.0
    return "mean", tasks * (tasks - 1) / 2 if align_pairs == "sum" else 1.0


def layer_value(per_latent: Tensor, latents: int, layers: str) -> tuple[Tensor, Tensor, float]:
    """Reduces losses of latents: the loss of a layer is the mean over its latents, the value the mean or sum of layers.

    Args:
        per_latent: [layers * latents].
        latents: how many latents a layer has.
        layers: "mean" or "sum".

    Returns:
        The value, the loss of each layer, and the weight of one latent's loss in the value.
    """
    per_layer = per_latent if latents == 1 else per_latent.view(-1, latents).mean(1)
    value = per_layer.mean() if layers == "mean" else per_layer.sum()
    return value, per_layer, 1 / (latents * (len(per_layer) if layers == "mean" else 1))
