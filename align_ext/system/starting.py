"""What the command does before it imports torch, so that this must be imported first.

A signal while it still imports ends it with one line. `bench` is started anew with the C library told to keep freed
memory: otherwise a large tensor is new pages, which the system clears as they are first touched, or kept ones,
depending on what was freed before, and of two variants that take turns one pays for pages that the other gave back.
"""

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end(number: int, _: object) -> None:
    """Ends the process at once: it has not written anything yet."""
    reason = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    os.write(2, f"align-lora: {reason}\n".encode())
    os._exit(128 + number)


def keep_freed_memory() -> None:
    """Starts this process anew with glibc's tunables for it, which its own child processes do not inherit.

    Without a cache of small pieces (tcache_count=0) those beside a large freed one become part of it again, so that the
    next tensor of its size, which needs them to be aligned, fits.
    """
    kept = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=0xffffffffffff:glibc.malloc.tcache_count=0"
    given = os.environ.get("GLIBC_TUNABLES", "")
    if not given.endswith(kept):
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": f"{given}:{kept}".lstrip(":")})
    os.environ["GLIBC_TUNABLES"] = given.removesuffix(kept).rstrip(":")


if os.path.basename(sys.argv[0]) == "align-lora" or sys.orig_argv[1:3] == ["-m", "align_ext.cli"]:
    for _number in SIGNALS:
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, end)
    _own = "bench" in sys.orig_argv  # a spawned child has the arguments of its parent in sys.argv
    if sys.argv[1:2] == ["bench"] and _own and "CS_GNU_LIBC_VERSION" in os.confstr_names:
        keep_freed_memory()
