"""Latents by task: how far apart the tasks are in the space that alignment works on."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.diagnostics.cosines import cosines
from align_ext.diagnostics.record import Recording
from align_ext.losses.kl import task_divergences
from align_ext.losses.tokens import heads_of
from align_ext.ops import task_moments


@dataclass(frozen=True)
class ExampleLatents:
    """One point an example.

    Attributes:
        layer: the module's name.
        points: [E, d], the mean of z over the example's tokens; d = r, or N r where heads have latents of their own.
        tasks: int64 [E].
    """

    layer: str
    points: Tensor
    tasks: Tensor


def latent_similarity(recording: Recording) -> dict[str, Tensor]:
    """Computes the cosine of every pair of tasks' mean latents mu_k = mean over the task's tokens of z, of each layer.

    Values near 1 in every pair mean that the tasks share a latent space, which is the aim of alignment. They are near 1
    before training too where the tasks share a prompt: task_divergence tells more.

    Args:
        recording: what record_adapters returned for a model of any architecture; the latents of all heads count as one
            vector.

    Returns:
        Module name -> [M, M]; NaN for tasks without a token.
    """
    tasks = recording.tasks
    return {
        name: cosines(torch.stack([z.flatten(1)[tasks == task].mean(0) for task in range(recording.num_tasks)]))
        for name, z in recording.latents.items()
    }


def task_divergence(recording: Recording) -> Tensor:
    """Computes the divergence of every pair of tasks, the mean over all adapted layers (2508.05078, eq. 5).

        D_ij = 1/4 Σ_d [v_i/v_j + v_j/v_i - 2 + (mu_i - mu_j)² (1/v_i + 1/v_j)],   v = variance + 1e-6

    mu and v are those of a task's tokens, per dimension d of z; where heads have latents of their own, D of a layer is
    the mean over them. The options are those of eq. 5 and not the model's, so that it means the same for every
    architecture, aligned or not. It is a sum over the dimensions: divide by r where ranks differ. For multi_adapter
    each task's z is of its own A, and so no measure of a common space.

    Args:
        recording: what record_adapters returned for a model of any architecture.

    Returns:
        [M, M], float64, in nats, symmetric with a zero diagonal.

    Raises:
        ValueError: a task has less than two tokens.
    """
    return torch.stack(list(layer_divergences(recording).values())).mean(0)


def layer_divergences(recording: Recording) -> dict[str, Tensor]:
    """Computes the divergence of every pair of tasks in each layer; their mean is task_divergence.

    Args:
        recording: what record_adapters returned for a model of any architecture.

    Returns:
        Module name -> [M, M], as in task_divergence.

    Raises:
        ValueError: a task has less than two tokens.
    """
    counts = torch.bincount(recording.tasks, minlength=recording.num_tasks)
    if int(counts.min()) < 2:
        task = int(counts.argmin())
        raise ValueError(f"the task {task} has {int(counts.min())} tokens, and a variance takes two: add rows of it")
    found = {}
    for name, z in recording.latents.items():
        heads = [head.contiguous() for head in heads_of(z)]
        moments = task_moments(heads, recording.tasks, recording.num_tasks)
        found[name] = task_divergences(moments, AlignLoraConfig(), len(heads)).fill_diagonal_(0)
    return found


def example_latents(recording: Recording, layer: str | None = None) -> ExampleLatents:
    """Computes the mean latent of each example in one layer, as drawn in 2508.05078, Figure 5.

    Args:
        recording: what record_adapters returned for a model of any architecture. A packed row is one example for each
            of its tasks.
        layer: the module's name; None: the middle one of the adapted layers.

    Raises:
        ValueError: there is no such layer.
    """
    names = list(recording.latents)
    layer = names[len(names) // 2] if layer is None else layer
    if layer not in recording.latents:
        raise ValueError(f"no adapted layer is called {layer!r}: choose one of {names[0]}, {names[-1]}, ...")
    z = recording.latents[layer].flatten(1)
    M = recording.num_tasks
    keys, example = torch.unique(recording.examples * M + recording.tasks, return_inverse=True)
    sums = torch.zeros(len(keys), z.shape[1], dtype=z.dtype).index_add_(0, example, z)
    return ExampleLatents(layer, sums / torch.bincount(example)[:, None], keys % M)
