"""Tensors that no allocator makes: views whose addresses and strides are multiples of one element alone."""

import pytest
import torch
from closeness import assert_draws_are_as_close_as_torch
from gpu.cases import EVERY_CASE, closeness_of, move

SIZES = {"cuda": [(1000, 264, 136, 8), (129, 67, 45, 5)], "cpu": [(70, 72, 40, 5)]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def odd(tensor):
    """The same numbers behind one element of another's, rows three elements longer than they are."""
    if tensor.dim() == 0 or tensor.numel() == 0:
        return tensor
    wide = tensor.new_zeros(*tensor.shape[:-1], tensor.shape[-1] + 3)
    view = wide[..., 1:-2]
    view.copy_(tensor)
    assert view.data_ptr() % 16 != 0
    return view


def transposed(tensor):
    """The same numbers in columns."""
    return tensor if tensor.dim() < 2 else tensor.mT.contiguous().mT


@pytest.mark.parametrize("change", [odd, transposed], ids=["odd", "transposed"])
@pytest.mark.parametrize("dtype", DTYPES)
@EVERY_CASE
def test_views(device, case, dtype, change):
    for size in SIZES[device.type]:

        def draw(seed, size=size):
            tensors = case.tensors(size, dtype, seed)
            views = {name: t if name == "rng" else change(t) for name, t in move(tensors, device).items()}
            return closeness_of(case, case.results(views), tensors)

        assert_draws_are_as_close_as_torch(draw)
