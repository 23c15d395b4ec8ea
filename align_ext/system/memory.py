"""Out-of-memory errors of any library become one line that says how to need less memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from align_ext.system.messages import reason_of

_MARKERS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


class OutOfMemory(OSError):
    """There is too little memory; the message is complete and needs no traceback."""


@contextmanager
def enough_memory(cure: str) -> Iterator[None]:
    """Raises OutOfMemory, whose message names the cure, if a block needs more memory than there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(f"there is not enough memory: {cure} ({reason_of(error)[:120]})") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that there is too little memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(marker in str(error) for marker in _MARKERS)
