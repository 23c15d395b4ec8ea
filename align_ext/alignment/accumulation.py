"""Aligns several micro-batches as one batch: a first pass for the statistics, a second one for the gradient.

The first pass leaves the model's buffers and torch's generators as it found them.

    union = align_statistics(model, batches)                     # forwards without gradients
    for batch, part in union.replay():                           # the same dropout masks again
        with align_step(model, batch.pop("task_ids"), batch.get("attention_mask")) as step:
            loss = model(**batch).loss
        step.total(loss / len(union), scale=1 / len(union), of=part).backward()

The alignment's gradient is then that of the one big batch. Otherwise each micro-batch is aligned by itself
(align_accumulation="micro"), or with the statistics of the last ones ("queue").
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.alignment.buffers import same_buffers
from align_ext.alignment.context import align_step
from align_ext.alignment.guards import world_size
from align_ext.alignment.micro_batch import MicroBatchShare
from align_ext.alignment.model_state import find_state


class AccumulatedBatch:
    """Micro-batches that are aligned together."""

    def __init__(self, batches: Sequence[Mapping[str, Any]], parts: list[MicroBatchShare]) -> None:
        self.batches, self.parts = batches, parts

    def __len__(self) -> int:
        return len(self.parts)

    def replay(self) -> Iterator[tuple[dict[str, Any], MicroBatchShare]]:
        """Yields a copy of each batch and its share, with torch's generators as in the first pass."""
        for batch, part in zip(self.batches, self.parts, strict=True):
            part.restore_rng()
            yield dict(batch), part


@torch.no_grad()
def align_statistics(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> AccumulatedBatch:
    """Runs the forwards of micro-batches for the statistics of their union, over all processes.

    Args:
        model: adapted, in training, with alignment on.
        batches: arguments of the model's forward, and task_ids.

    Raises:
        ValueError: no batches, no alignment, or a batch without task_ids.
    """
    state = find_state(model)
    if state is None or state.config.align is None:
        raise ValueError("the model has no alignment to gather statistics for: choose align='kl' or 'mmd'")
    if not batches:
        raise ValueError("batches is empty: give the micro-batches of a step")
    own: list[Any] = []
    rng = []
    with same_buffers(model):
        for batch in batches:
            inputs = dict(batch)
            ids, labels = inputs.pop("task_ids", None), inputs.get("labels")
            if not state.encoder_decoder:  # an encoder-decoder makes its decoder's tokens from the labels
                inputs.pop("labels", None)
            rng.append(_rng_state())
            with align_step(model, ids, inputs.get("attention_mask"), labels) as step:
                model(**inputs)
            own.append(step.statistics())
    union = own[0]
    for statistics in own[1:]:
        union = union.merge(statistics)
    union = union.over_processes() if world_size() > 1 else union
    parts, before = [], 0
    for statistics, states in zip(own, rng, strict=True):
        parts.append(MicroBatchShare(union.after(before), len(own), states))
        before += statistics.tokens
    return AccumulatedBatch(batches, parts)


def _rng_state() -> tuple[Tensor, ...]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), *devices
