"""The sizes and durations of a run of the benchmark."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import torch

from align_ext.bench.baselines import Sizes
from align_ext.bench.timing import Comparison, endless
from align_ext.system.terminal import PrintLine

TASKS = 5


@dataclass(frozen=True)
class Setting:
    """The sizes of a run.

    Attributes:
        device: "cpu" or "cuda".
        sizes: the sizes of the adapters.
        shapes: (in, out) of the layers; the first is also that of the plots.
        dtypes: the dtypes of the frozen layers.
        batches: the tokens of the layers that are compared with their restructured form.
        visits: the most visits to each comparison; all comparisons are visited in turn.
        rounds: the most rounds of a visit.
        seconds: the time of a run, after which no further visit begins.
        share: returns the time that the visit which begins now may take: its share of what is left.
        compiled: the number of tables of layers that include baselines under torch.compile, which is slow to compile.
        mixed: the number of shapes for which 16-bit layers are also measured with float32 adapters.
        model: the model for training steps and decoding: "random" (SmolLM2-135M's sizes), "tiny", "smollm2" (the model
            itself), a folder or a hub id.
        batch: the number of samples in a step.
        seq_len: the number of tokens in a sample.
        step_dtypes: the dtypes of the models for training steps.
        step_rounds: the most rounds of training steps.
        step_seconds: the time after which steps that are measured together begin no further round.
        steps: the variants for training steps: a "few", the "usual" ones, "every" one, or those for a base that is
            "quantised" (models.variants).
        goals: whether the goals are for these sizes.
    """

    device: str = "cpu"
    sizes: Sizes = field(default_factory=Sizes)
    shapes: tuple[tuple[int, int], ...] = ((576, 1536), (2048, 5504))
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)
    batches: tuple[int, ...] = (128, 256, 1024, 2048)
    visits: int = 4
    rounds: int = 5
    seconds: float = 450
    share: Callable[[], float] = endless
    compiled: int = 1
    mixed: int = 1
    model: str = "random"
    batch: int = 2
    seq_len: int = 128
    step_dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    step_rounds: int = 6
    step_seconds: float = 25
    steps: Literal["few", "usual", "every", "quantised"] = "usual"
    goals: bool = True

    @property
    def longest_round(self) -> float:
        """The seconds of a round that is not too long."""
        return self.seconds / 30


@dataclass(frozen=True)
class Case:
    """One comparison: the table and the column that hold it, and its visits, each of which yields all so far."""

    table: str
    column: str
    run: Callable[[PrintLine], Iterator[Comparison]]

    @property
    def title(self) -> str:
        """The table and the column."""
        return f"{self.table}: {self.column}"


def name_of(dtype: torch.dtype) -> str:
    """Returns the name of a dtype as users write it."""
    return str(dtype).removeprefix("torch.")
