"""What one run of the benchmark measures, at which sizes and for how long."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from align_ext.bench.baselines import Sizes
from align_ext.bench.timing import Comparison

TASKS = 5
PrintLine = Callable[[str], None]  # tells the progress bar what is under way


@dataclass(frozen=True)
class Setting:
    """The sizes of a run.

    Attributes:
        device: "cpu" or "cuda".
        sizes: of the adapters.
        shapes: (in, out) of the layers; the first is also that of the plots.
        dtypes: of the frozen layers.
        visits: to each comparison, one after the other to all of them.
        rounds: of a visit at most.
        seconds: after which a visit begins no further round.
        compiled: how many tables of layers have the baselines under torch.compile too, which takes long to compile.
        mixed: at how many of the shapes 16-bit layers are measured with float32 adapters too.
        model: that takes whole steps and decodes: "random" (SmolLM2-135M's sizes), "tiny", "smollm2" (the model
            itself), a folder or a hub id.
        batch: samples of a step.
        seq_len: tokens of each.
        step_dtypes: of the models that take whole steps.
        step_rounds: of whole steps.
        steps: which variants take whole steps: a "few", the "usual" ones, or "every" one (models.variants).
        goals: whether these sizes are those that goals are laid down for.
    """

    device: str = "cpu"
    sizes: Sizes = field(default_factory=Sizes)
    shapes: tuple[tuple[int, int], ...] = ((576, 1536), (2048, 5504))
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    visits: int = 4
    rounds: int = 5
    seconds: float = 2
    compiled: int = 1
    mixed: int = 1
    model: str = "random"
    batch: int = 2
    seq_len: int = 128
    step_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    step_rounds: int = 6
    steps: Literal["few", "usual", "every"] = "usual"
    goals: bool = True


@dataclass(frozen=True)
class Case:
    """One table of the report: its title, and its visits, each of which yields all that is known so far."""

    title: str
    run: Callable[[PrintLine], Iterator[Comparison]]


def name_of(dtype: torch.dtype) -> str:
    """The name of a dtype, as users write it."""
    return str(dtype).removeprefix("torch.")
