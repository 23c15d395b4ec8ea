"""How a command ends from outside: SIGTERM and SIGHUP interrupt it as Ctrl-C does, or where it asks after a step."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from align_ext.system import starting

_received: list[signal.Signals] = []
_deferring: list[bool] = []


def listen() -> None:
    """From now on both signals raise KeyboardInterrupt, unless the process was started to ignore them (nohup)."""
    _received.clear()
    if signal.getsignal(signal.SIGINT) is starting.end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _ended)


def received() -> signal.Signals | None:
    """The signal that came, if one did."""
    return _received[0] if _received else None


@contextmanager
def deferred() -> Iterator[Callable[[], signal.Signals | None]]:
    """Within, the first signal only sets what the function returns; a second one interrupts."""
    _deferring.append(True)
    try:
        yield received
    finally:
        _deferring.pop()


def _ended(number: int, _: object) -> None:
    first = not _received
    _received.append(signal.Signals(number))
    if not (first and _deferring):
        raise KeyboardInterrupt
