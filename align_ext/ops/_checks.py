"""Checks of numeric arguments, and of dtypes where no kernel checks them: on the meta device and in compilers.

The bindings of the kernels (csrc/bindings) make the same checks with the same messages. Limits: csrc/ops/sizes.h.
"""

import operator
from typing import Any

import torch
from torch import Tensor

MAX_COUNT = 2**16  # kMaxCount: the largest number of tasks
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked_integer(name: str, value: Any, minimum: int = 1, maximum: int = MAX_COUNT) -> int:
    """Returns the value if it is an integer between two limits.

    Raises:
        ValueError: it is not; the message names the argument and its limits.
    """
    try:
        number: Any = value if isinstance(value, torch.SymInt) else operator.index(value)
    except TypeError:
        number = minimum - 1
    if not minimum <= number <= maximum:
        raise ValueError(f"{name} must be an integer in {minimum} .. {maximum}, got {value!r}")
    return number


def _check(name: str, tensor: Tensor | None, allowed: tuple[torch.dtype, ...], what: str) -> None:
    if tensor is not None and tensor.dtype not in allowed:
        raise RuntimeError(f"{name} must be {what}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_floating(**tensors: Tensor | None) -> None:
    """Refuses tensors of a dtype that the kernels do not support."""
    for name, tensor in tensors.items():
        _check(name, tensor, _FLOATING, "float32, bfloat16, float16 or float64")


def check_like_x(x: Tensor, **tensors: Tensor | None) -> None:
    """Refuses tensors whose dtype is not that of x."""
    for name, tensor in tensors.items():
        _check(name, tensor, (x.dtype,), "of the dtype of x")


def check_integers(**tensors: Tensor | None) -> None:
    """Refuses tensors that are not int64."""
    for name, tensor in tensors.items():
        _check(name, tensor, (torch.int64,), "int64")
