"""The products of rows with the frozen weights of experts, of which each owns a range of the rows."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from align_ext.ops._autograd import differentiable

_GROUPED = (torch.bfloat16, torch.float16, torch.float32)  # the dtypes of torch's grouped_mm


def expert_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Computes y_t = x_t W_e for the rows t in offsets[e] .. offsets[e+1]; backward dx_t = dy_t W_eᵀ.

    Args:
        x: [T, n].
        weight: [E, n, m], frozen, of any strides, in x's dtype.
        offsets: int64 [E + 1], from 0 to T.

    Returns:
        [T, m] in x's dtype.
    """
    return _differentiable(x, weight, offsets)


def _product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    grouped = x.is_cuda and x.dtype in _GROUPED and torch.cuda.get_device_capability(x.device) >= (8, 0)
    if grouped and _aligned(x, weight):
        return functional.grouped_mm(x, weight, offs=offsets[1:].int())
    y = x.new_empty(len(x), weight.shape[2])
    for of_expert, (begin, end) in zip(weight, pairwise(offsets.tolist()), strict=True):
        torch.mm(x[begin:end], of_expert, out=y[begin:end])
    return y


def _aligned(*tensors: Tensor) -> bool:
    """Whether rows begin at multiples of 16 bytes, as grouped_mm needs them."""
    strides = [stride * t.element_size() for t in tensors for stride in t.stride() if stride != 1]
    return all(number % 16 == 0 for number in (*strides, *(t.data_ptr() for t in tensors)))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, weight, offsets = inputs
    ctx.save_for_backward(weight, offsets)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    weight, offsets = ctx.saved_tensors
    return (expert_product(dy.contiguous(), weight.mT, offsets),)


_library = torch.library.Library("align_ext", "FRAGMENT")
_library.define(
    "expert_product(Tensor x, Tensor weight, Tensor offsets) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # it may wait for the device, to know the offsets
)
_library.impl("expert_product", _product, "CompositeExplicitAutograd")
torch.library.register_fake("align_ext::expert_product", lambda x, weight, _: x.new_empty(len(x), weight.shape[2]))
_differentiable = differentiable("expert_product", _backward, _setup_context, ["x"])
