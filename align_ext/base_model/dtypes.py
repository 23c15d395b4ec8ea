"""The dtype and the device that a model is loaded in."""

import functools
import time

import torch

from align_ext.ops._backend import has_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_dtype(device: str | None = None) -> torch.dtype:
    """Returns bfloat16 if it is fast (on a GPU that supports it, on a CPU that multiplies faster in it), else float32.

    Args:
        device: "cpu", "cuda" or "cuda:1"; None: a GPU if there is one.
    """
    if (device or "").startswith("cuda") or (device is None and torch.cuda.is_available()):
        is_fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        is_fast = _cpu_prefers_bfloat16()
    return torch.bfloat16 if is_fast else torch.float32


@functools.cache
def _cpu_prefers_bfloat16() -> bool:
    """Whether a matrix product is much faster in bfloat16, by measurement (about 50 ms).

    The instruction set does not decide it: with AMX, bfloat16 is several times faster than float32; with AVX512-BF16
    alone, it was twice as slow on one machine and faster on another.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(256, 1024, dtype=dtype), torch.ones(1024, 1024, dtype=dtype)
        times = []
        for _ in range(6):  # the first one is a warm-up; the minimum is the least disturbed
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            times.append(time.perf_counter() - start)
        seconds[dtype] = min(times)
    return seconds[torch.bfloat16] < 0.8 * seconds[torch.float32]


def resolve_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """Returns the torch dtype of a name; "auto" is `best_dtype()`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return best_dtype()
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def usable_device(device: str = "auto") -> str:
    """Returns the device to run on, "cpu", "cuda" or "cuda:1"; a GPU only if this build has CUDA kernels of adapters.

    Raises:
        ValueError: "cuda", or the GPU of that number, is requested but cannot be used.
    """
    kind, _, number = device.partition(":")
    if not torch.cuda.is_available():
        missing = "torch sees no GPU here"
    elif not has_kernel("grouped_lora", "cuda"):
        missing = "this build has no CUDA kernels of the adapters"
    elif number and not (number.isdecimal() and int(number) < torch.cuda.device_count()):
        missing = f"the GPUs here are 0 .. {torch.cuda.device_count() - 1}"
    elif kind == "cpu":
        return "cpu"
    else:
        return device if kind == "cuda" else "cuda"
    if kind == "cuda":
        raise ValueError(f"device={device}, but {missing}: use --device cpu")
    return "cpu"
