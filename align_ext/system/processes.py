"""What the processes of one command do together, and what the first of them does for all.

torchrun and accelerate start several processes with the same command. They join for the length of the command; without
them every function here is that of a single process.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from align_ext.system.messages import reason_of

_LONGEST = timedelta(days=7)  # what one process does alone, while the others wait, may take long
_groups: list[Any] = []  # the group of messages, which go through the CPU

_T = TypeVar("_T")


class FailedElsewhere(Exception):
    """Another process has failed, and says why."""


def started() -> int:
    """Returns how many processes a launcher has started, this one included."""
    count = os.environ.get("WORLD_SIZE", "1")
    return int(count) if count.isdecimal() and "RANK" in os.environ else 1


def number() -> int:
    """Returns this process's number; 0 is the first one, which reports and writes."""
    return dist.get_rank() if _groups else 0


def count() -> int:
    """Returns how many processes have joined."""
    return dist.get_world_size() if _groups else 1


def have_joined() -> bool:
    """Whether this process has joined others, also in a block that has failed: an error may be its own alone."""
    return dist.is_available() and dist.is_initialized()


@contextmanager
def joined(device: str) -> Iterator[None]:
    """Joins all processes that were started, for a block; each gets a GPU of its own if the device is "cuda".

    Raises:
        ValueError: there are more processes than GPUs on this machine, or they do not find one another.
    """
    if started() == 1 or _groups:
        yield
        return
    local, backend = int(os.environ.get("LOCAL_RANK", "0")), "gloo"
    if device == "cuda":
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine has no GPU, since there are {torch.cuda.device_count()}: start as "
                "many processes as GPUs, or give --device cpu"
            )
        torch.cuda.set_device(local)
        backend = "cpu:gloo,cuda:nccl"
    ours = not dist.is_initialized()
    try:
        if ours:
            dist.init_process_group(backend)
        _groups.append(dist.new_group(backend="gloo", timeout=_LONGEST))
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"the {started()} processes do not find one another: {reason_of(error)}") from error
    try:
        yield
        dist.barrier(_groups[0])
    finally:
        _groups.clear()
    if ours:
        dist.destroy_process_group()


def by_first(make: Callable[[], _T]) -> _T:
    """Calls a function in the first process; all processes get its result, or raise FailedElsewhere if it failed."""
    if count() == 1:
        return make()
    message: list[Any] = [None, None]
    if number() == 0:
        try:
            message[0] = make()
        except BaseException as error:
            dist.broadcast_object_list([None, reason_of(error)], src=0, group=_groups[0])
            raise
    dist.broadcast_object_list(message, src=0, group=_groups[0])
    if message[1] is not None:
        raise FailedElsewhere(message[1])
    return message[0]


@contextmanager
def all_or_none() -> Iterator[None]:
    """If a block fails in one process, it fails in all of them: all but the first that failed raise FailedElsewhere.

    The block must not wait for other processes after a failure.
    """
    if count() == 1:
        yield
        return
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    reasons = from_all(None if failed is None else reason_of(failed))
    first = next((i for i, reason in enumerate(reasons) if reason is not None), None)
    if first is not None:
        raise failed if failed is not None and first == number() else FailedElsewhere(reasons[first])


def from_all(value: _T) -> list[_T]:
    """Returns the values of all processes, in their order."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value, group=_groups[0])
    return values


def divided(items: Sequence[Any], work: Callable[[list[Any]], Sequence[_T]]) -> list[_T]:
    """Returns work(items), of which each process does a share; work returns one result for each item."""
    parts = from_all(list(work([*items[number() :: count()]])))
    return [parts[i % count()][i // count()] for i in range(len(items))]


def any_of_all(value: object) -> bool:
    """Whether a value is true in any process."""
    return bool(value) if count() == 1 else any(from_all(bool(value)))
