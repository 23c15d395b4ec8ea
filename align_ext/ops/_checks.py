"""Checks of the public functions' numbers, and of dtypes where no kernel sees them: on the meta device, in compilers.

The kernels' bindings (csrc/bindings) check all of it in the same words. Limits: csrc/ops/sizes.h.
"""

import operator
from typing import Any

import torch
from torch import Tensor

MAX_COUNT = 2**16  # kMaxCount: of tasks
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def checked_integer(name: str, value: Any, least: int = 1, most: int = MAX_COUNT) -> int:
    """The value, if it is an integer between two limits.

    Raises:
        ValueError: it is not; the message names the argument and its limits.
    """
    try:
        number: Any = value if isinstance(value, torch.SymInt) else operator.index(value)
    except TypeError:
        number = least - 1
    if not least <= number <= most:
        raise ValueError(f"{name} must be an integer in {least} .. {most}, got {value!r}")
    return number


def _check(name: str, tensor: Tensor | None, allowed: tuple[torch.dtype, ...], what: str) -> None:
    if tensor is not None and tensor.dtype not in allowed:
        raise RuntimeError(f"{name} must be {what}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_floating(**tensors: Tensor | None) -> None:
    """Refuses tensors of a dtype that no kernel computes with."""
    for name, tensor in tensors.items():
        _check(name, tensor, _FLOATING, "float32, bfloat16, float16 or float64")


def check_like_x(x: Tensor, **tensors: Tensor | None) -> None:
    """Refuses tensors of another dtype than x."""
    for name, tensor in tensors.items():
        _check(name, tensor, (x.dtype,), "of the dtype of x")


def check_integers(**tensors: Tensor | None) -> None:
    """Refuses tensors that are not int64."""
    for name, tensor in tensors.items():
        _check(name, tensor, (torch.int64,), "int64")
