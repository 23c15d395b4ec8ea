"""Signals that end a command: SIGTERM and SIGHUP interrupt it like Ctrl-C, or wait until the current step is done."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from align_ext.system import starting

_received: list[signal.Signals] = []
_deferring: list[bool] = []


def listen() -> None:
    """Makes both signals raise KeyboardInterrupt, unless the process was started to ignore them (nohup)."""
    _received.clear()
    if signal.getsignal(signal.SIGINT) is starting.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle_signal)


def received() -> signal.Signals | None:
    """Returns the first signal that was received, or None."""
    return _received[0] if _received else None


@contextmanager
def deferred() -> Iterator[Callable[[], signal.Signals | None]]:
    """Within the block, the first signal is only returned by the yielded function; a second one interrupts."""
    _deferring.append(True)
    try:
        yield received
    finally:
        _deferring.pop()


def _handle_signal(number: int, _: object) -> None:
    first = not _received
    _received.append(signal.Signals(number))
    if not (first and _deferring):
        raise KeyboardInterrupt
