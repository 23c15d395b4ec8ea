"""The seeds of a step's dropout masks: drawn once, one for each layer, found again by what is recomputed."""

import pytest
import torch
from test_batch import CHECKPOINTING, checkpointed
from tiny import adapted, batch
from torch.utils._python_dispatch import TorchDispatchMode


class Draws(TorchDispatchMode):
    """Counts the draws of seeds, and keeps seed and offset of each layer's mask."""

    def __init__(self):
        super().__init__()
        self.count, self.rngs = 0, []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.count += operator.name().startswith("aten::randint")
        if operator is torch.ops.align_ext.grouped_lora.default:
            self.rngs.append(args[7])
        if operator is torch.ops.align_ext.sibling_lora.default:  # gate and up
            self.rngs.append(args[12])
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", CHECKPOINTING)
def test_a_step_draws_once_and_every_layer_has_a_mask_of_its_own(mode):
    model = checkpointed(adapted(lora_dropout=0.3), mode)
    inputs, tasks = batch()
    with Draws() as draws:
        loss = model(**inputs, task_ids=tasks).loss
        forward = [tuple(rng.tolist()) for rng in draws.rngs]
        loss.backward()
    assert draws.count == 1
    assert len(set(forward)) == len(forward) == 4  # of two layers: gate and up together, down
    recomputed = [tuple(rng.tolist()) for rng in draws.rngs[len(forward) :]]
    assert sorted(recomputed) == ([] if mode is None else sorted(forward))
    with Draws() as next_step:
        model(**inputs, task_ids=tasks)
    assert not {tuple(rng.tolist()) for rng in next_step.rngs} & set(forward)
