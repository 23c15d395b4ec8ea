"""Memory that does not suffice: whatever the library that asked for it raises, one line with the cure."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from align_ext.system.reading import reason_of

_WORDS = ("DefaultCPUAllocator", "out of memory", "ALLOC_FAILED")


class OutOfMemory(OSError):
    """There is too little memory; the message is the whole answer."""


@contextmanager
def enough_memory(cure: str) -> Iterator[None]:
    """Raises OutOfMemory, which names the cure, where a block asks for more memory than there is."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_memory(error):
            raise
        raise OutOfMemory(f"there is not enough memory: {cure} ({reason_of(error)[:120]})") from error


def is_memory(error: BaseException) -> bool:
    """Whether an exception says that there is too little memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(word in str(error) for word in _WORDS)
