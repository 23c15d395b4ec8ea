"""Conflict between tasks: whether their gradients pull the same parameters apart."""

from typing import Literal

import torch
from torch import Tensor

from align_ext.diagnostics.cosines import cosines
from align_ext.diagnostics.module_types import block_of
from align_ext.diagnostics.record import Recording

Level = Literal["component", "block"]


def gradient_cosines(recording: Recording, level: Level = "component") -> dict[str, Tensor]:
    """Computes the cosine of every pair of tasks' gradients, of each module or of each block.

        cos(g_i, g_j) = <g_i, g_j> / (|g_i| |g_j|),   g_k = d L_k / d (parameters of the unit's adapters)

    L_k is the language-model loss of task k (record_adapters). Two tasks conflict where the cosine is negative
    (PCGrad, 2001.06782, definition 1). mtLoRA (2603.01526) compares adapters of components (q_proj, v_proj) with one of
    a whole block by the mean over pairs of these cosines, layer by layer (its Figure S3); "block" puts the gradients of
    all components of a block together, so that both forms compare. Few rows a task make gradients noisy, which pulls
    cosines towards 0. For multi_adapter they are 0: tasks share no parameter.

    Args:
        recording: what record_adapters(..., gradients=True) returned for a model of any architecture.
        level: "component", each adapted module by itself, or "block": an attention or MLP block of a layer as one.

    Returns:
        Name of the module or block -> [M, M]; NaN for a task whose gradient is zero.

    Raises:
        ValueError: the recording has no gradients, or the level is unknown.
    """
    if level not in ("component", "block"):
        raise ValueError(f'level must be "component" or "block", got {level!r}')
    units: dict[str, list[Tensor]] = {}
    for name, gradients in recorded_gradients(recording).items():
        unit = name if level == "component" else block_of(name)
        units.setdefault(unit, []).extend(gradient.flatten(1) for gradient in gradients.values())
    return {name: cosines(torch.cat(parts, 1)) for name, parts in units.items()}


def recorded_gradients(recording: Recording) -> dict[str, dict[str, Tensor]]:
    """Returns the gradients of a recording.

    Raises:
        ValueError: it has none.
    """
    if not recording.gradients:
        raise ValueError("the recording has no gradients: record_adapters(model, batches, gradients=True)")
    return {name: dict(gradients) for name, gradients in recording.gradients.items()}
