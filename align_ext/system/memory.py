"""How much memory there is; out-of-memory errors of any library become one line that says how to need less."""

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

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


def peak_memory(device: str) -> int:
    """Returns the most memory in bytes that was in use at once: of the process on a CPU, of its tensors on a GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):  # not getrusage's maximum, which may be that of the process that started this one
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return 2**10 * int(status["VmHWM"].split()[0])
    return 2**10 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # elsewhere than on Linux


def available_memory(device: str) -> int | None:
    """Returns the bytes that this process has and can still get: of a GPU ("cuda"), or else of main memory.

    Main memory is limited by a control group too, as in a container. None: the system does not say.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    try:
        fields = dict(row.split(":") for row in Path("/proc/meminfo").read_text().splitlines())
        own = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found = int(fields["MemAvailable"].split()[0]) * 2**10 + own
    except (OSError, LookupError, ValueError):
        return None
    with suppress(OSError, ValueError):  # "max", or no such file
        found = min(found, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return found


def shown_bytes(count: float) -> str:
    """Returns a number of bytes as text: 512 KiB, 20 MiB, 2.4 GiB."""
    for unit in ("KiB", "MiB"):
        count /= 2**10
        if count < 2**10:
            return f"{count:.0f} {unit}"
    return f"{count / 2**10:.1f} GiB"
