"""What a training step holds on to: as much after many micro-batches as after one."""

import gc

import pytest
import torch
from test_batch import by_keyword, checkpointed
from tiny import adapted

LOSSES = {"kl": {}, "mmd": {"align": "mmd"}, "queue": {"align_accumulation": "queue", "align_queue": 2}}


def tensors_alive() -> int:
    """The bytes of all tensors that Python can reach, but for the compiler's of symbolic sizes, which hold none."""
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
    tensors = [tensor for tensor in tensors if not tensor._has_symbolic_sizes_strides]
    return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    ("losses", "mode"), [("kl", None), ("kl", "non-reentrant"), ("kl", "reentrant"), ("mmd", None), ("queue", None)]
)
def test_memory_is_flat_in_the_number_of_micro_batches(losses, mode):
    model = checkpointed(adapted(**LOSSES[losses]), mode)

    def after(micro_batches: range) -> int:
        for micro_batch in micro_batches:
            by_keyword(model, micro_batch)().backward()
        return tensors_alive()

    few = after(range(3))  # the gradients are there, and the queue is full
    assert after(range(3, 9)) == few
