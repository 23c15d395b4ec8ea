"""What a training step holds on to: as much after many micro-batches as after one."""

import gc

import pytest
import torch
from test_batch import by_keyword, checkpointed
from tiny import adapted

LOSSES = {"kl": {}, "mmd": {"align": "mmd"}, "queue": {"align_accumulation": "queue", "align_queue": 2}}


def tensors_alive() -> list[torch.Tensor]:
    """All tensors that Python can reach."""
    gc.collect()
    return [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]


def memory(tensors: list[torch.Tensor]) -> int:
    """The bytes of the tensors' storages, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.mark.parametrize(
    ("losses", "mode"),
    [
        ("kl", None),
        ("queue", None),
        pytest.param("mmd", None, marks=pytest.mark.slow),
        pytest.param("kl", "non-reentrant", marks=pytest.mark.slow),
        pytest.param("kl", "reentrant", marks=pytest.mark.slow),
    ],
)
def test_memory_is_flat_in_the_number_of_micro_batches(losses, mode):
    others = tensors_alive()  # those of tests before this one, which live on so that their ids stay theirs
    ids = set(map(id, others))
    model = checkpointed(adapted(**LOSSES[losses]), mode)

    def after(micro_batches: range) -> int:
        for micro_batch in micro_batches:
            by_keyword(model, micro_batch)().backward()
        return memory([tensor for tensor in tensors_alive() if id(tensor) not in ids])

    few = after(range(3))  # the gradients are there, and the queue is full
    assert after(range(3, 9)) == few
