"""Signals that end a command: SIGTERM and SIGHUP interrupt it like Ctrl-C; in training all wait for a step's end."""

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from align_ext.system import starting

_SAME = 1.0  # seconds in which a second signal is the first one again: torchrun passes on what a terminal sends to all
_WAITING = b"\nalign-lora: writing a checkpoint after this step; Ctrl-C again ends at once\n"
_LIBC, _PR_SET_PDEATHSIG = ctypes.CDLL(None), 1
_received: list[tuple[signal.Signals, float]] = []  # and when
_deferring: list[bool] = []


def listen() -> None:
    """Makes both signals raise KeyboardInterrupt, unless the process was started to ignore them (nohup)."""
    _received.clear()
    if signal.getsignal(signal.SIGINT) is starting.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle_signal)


def stop_listening() -> None:
    """Lets both signals end the process at once again: the command is over, and only Python itself is to end."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is _handle_signal:
            signal.signal(number, signal.SIG_DFL)


def end_with_parent() -> None:
    """Lets SIGTERM end this process, and what it becomes by exec, when its parent ends, also by SIGKILL; Linux only."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def received() -> signal.Signals | None:
    """Returns the first signal that was received, or None."""
    return _received[0][0] if _received else None


@contextmanager
def deferred() -> Iterator[Callable[[], signal.Signals | None]]:
    """Within the block the first signal, also Ctrl-C, is what the yielded function returns; a later one interrupts."""
    _deferring.append(True)
    in_main, of_python = threading.current_thread() is threading.main_thread(), signal.default_int_handler
    hears = in_main and signal.getsignal(signal.SIGINT) is of_python
    if hears:
        signal.signal(signal.SIGINT, _handle_signal)
    try:
        yield received
    finally:
        _deferring.pop()
        if hears:
            signal.signal(signal.SIGINT, of_python)


def _handle_signal(number: int, _: object) -> None:
    first, now = not _received, time.monotonic()
    _received.append((signal.Signals(number), now))
    if not _deferring or now - _received[0][1] > _SAME:
        raise KeyboardInterrupt
    if first and number == signal.SIGINT and os.environ.get("RANK", "0") == "0":
        os.write(2, _WAITING)
