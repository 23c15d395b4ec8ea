"""Measures the similarity of heads and of tasks, and how routers distribute tokens over the heads."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.base import Captured
from align_ext.adapters.capture import adapters_of, capture_latents
from align_ext.losses.tokens import TokenTasks


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


def cosines(vectors: Tensor) -> Tensor:
    """Computes the cosine of every pair of rows, [K, K] for [K, d]; NaN where a row is zero."""
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    units = vectors / vectors.norm(dim=1, keepdim=True)
    return units @ units.T


def head_similarity(model: nn.Module) -> dict[str, Tensor]:
    """Computes the cosine of every pair of flattened heads B_i, B_j of each layer (2508.05078, Figure 2).

    For multi_adapter, the B of the tasks. Values near 1 mean that the heads learned the same and one would be enough.

    Args:
        model: a model whose adapters have several heads (hydra, r_lora, m_lora, lora_moe, mtlora) or tasks.

    Returns:
        Module name -> [N, N], float32; NaN for heads that are still zero.

    Raises:
        ValueError: no layer has several heads.
    """
    heads: dict[str, Any] = {name: adapter.lora_B for name, adapter in adapters_of(model).items()}
    found = {name: cosines(B.flatten(1)) for name, B in heads.items() if B.dim() == 3}
    if not found:
        raise ValueError("no layer has several heads: their similarity is one of hydra, r_lora, m_lora, ...")
    return found


def routing(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Routing]:
    """Measures the routers on a batch in eval mode.

    Args:
        model: a model with routed adapters (hydra, r_lora, lora_moe, mtlora).
        batch: the model's inputs; tokens with attention_mask 0 or task_ids -1 do not count.

    Returns:
        Module name -> Routing.

    Raises:
        ValueError: no layer has a router, or no token counts.
    """
    found = {name: w for name, (_, w) in _captured(model, batch).items() if w is not None}
    if not found:
        raise ValueError("no layer has a router: routing is measured for hydra, r_lora, lora_moe and mtlora")
    tokens = _tasks(batch)
    return {name: _routing(w[_counted_rows(tokens, w)].flatten(0, 1)) for name, w in found.items()}


def _routing(w: Tensor) -> Routing:
    """Returns the measures for weights [tokens * groups, N]."""
    heads = w.shape[1]
    if not len(w):
        raise ValueError("no token of the batch counts: they are all padding or of task -1")
    entropy = torch.special.entr(w).sum(1).mean()
    load = torch.bincount(w.argmax(1), minlength=heads) / len(w)
    return Routing(float(entropy) / math.log(heads) if heads > 1 else 1.0, w.mean(0), load)


def latent_similarity(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Computes the cosine of every pair of tasks' mean latents mu_k = mean over the task's tokens of z, of each layer.

    Values near 1 in every pair mean that the tasks share a latent space, which is the aim of alignment.

    Args:
        model: a model with adapters of any kind; the latents of all heads count as one vector.
        batch: the model's inputs with task_ids [B] or [B, S].

    Returns:
        Module name -> [M, M], M the largest id plus one; NaN for tasks without a token.

    Raises:
        ValueError: the batch has no task_ids.
    """
    if batch.get("task_ids") is None:
        raise ValueError("the batch has no task_ids: give one id per sample, [B], or per token, [B, S]")
    tokens, tasks = _tasks(batch), int(torch.as_tensor(batch["task_ids"]).max()) + 1
    found = {}
    for name, (z, _) in _captured(model, batch).items():
        ids = _ids(tokens, z)
        found[name] = cosines(torch.stack([z.flatten(1)[ids == task].mean(0) for task in range(tasks)]))
    return found


def mean_similarity(layers: Mapping[str, Tensor]) -> Tensor:
    """Computes the mean over the layers of their matrices, leaving out NaN; [K, K]."""
    return torch.stack([matrix.cpu() for matrix in layers.values()]).nanmean(0)


def plot_similarity(layers: Mapping[str, Tensor], file: str | os.PathLike[str]) -> str | None:
    """Draws a heat map of each layer's matrix; returns the file's name, or None without matplotlib.

    Args:
        layers: the result of head_similarity or latent_similarity.
        file: the file; its suffix selects the format (.png, .svg, .pdf).
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    columns = min(len(layers), 6)
    rows = math.ceil(len(layers) / columns)
    figure = Figure(figsize=(2.2 * columns + 0.8, 2.4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, (name, matrix) in zip(axes, layers.items(), strict=False):
        image = axis.imshow(matrix.cpu().numpy(), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(name.removeprefix("model.layers."), fontsize="x-small")
        axis.set(xticks=range(len(matrix)), yticks=range(len(matrix)))
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    figure.colorbar(image, ax=axes.tolist(), label="cosine")
    figure.savefig(file, dpi=120)
    return os.fspath(file)


def _tasks(batch: Mapping[str, Any]) -> TokenTasks | None:
    """Returns the task of every token, -1 if it does not count, 0 without task_ids; None without ids and mask."""
    ids, mask = batch.get("task_ids"), batch.get("attention_mask")
    if ids is None and mask is None:
        return None
    ids = torch.zeros(1, dtype=torch.int64) if ids is None else torch.as_tensor(ids)
    if mask is not None:
        ids = torch.where(mask.to(ids.device) != 0, ids[:, None] if ids.dim() == 1 else ids, -1)
    return TokenTasks(ids)


def _ids(tokens: TokenTasks | None, output: Tensor) -> Tensor:
    """Returns the task of each row of a layer's output [T, ...]."""
    if tokens is None:
        return torch.zeros(len(output), dtype=torch.int64, device=output.device)
    tokens.check(len(output))
    return tokens.expand(output.device, len(output))


def _counted_rows(tokens: TokenTasks | None, output: Tensor) -> Tensor:
    return _ids(tokens, output) >= 0


@torch.no_grad()
def _captured(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Captured]:
    """Returns the outputs of each layer's adapter in eval mode."""
    training = model.training
    try:
        with capture_latents(model) as captured:
            model.eval()(**batch)
    finally:
        model.train(training)
    return captured
