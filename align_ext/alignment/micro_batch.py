"""One of several micro-batches that are aligned as one batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from align_ext.losses.statistics import Statistics


@dataclass(frozen=True)
class MicroBatchShare:
    """The data with which one micro-batch is aligned with the others of its step (accumulation.py).

    Attributes:
        statistics: the statistics of all micro-batches and processes, with the offset of this one's tokens.
        parts: number of micro-batches.
        rng: states of torch's generators before its forward.
    """

    statistics: Statistics
    parts: int
    rng: tuple[Tensor, ...]

    def restore_rng(self) -> None:
        """Sets torch's generators so that the forward draws the dropout masks of the first pass."""
        torch.set_rng_state(self.rng[0])
        if len(self.rng) > 1:
            torch.cuda.set_rng_state_all(list(self.rng[1:]))
