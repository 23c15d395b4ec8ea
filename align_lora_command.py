"""The command align-lora: listens to signals before the package is there, whose import takes a second or two."""

from __future__ import annotations

import os
import signal
import sys


def _end(number: int, _: object) -> None:
    """Ends at once: nothing has been made so far."""
    name = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    os.write(2, f"align-lora: {name}\n".encode())
    os._exit(128 + number)


def main() -> None:
    """Imports the command line and runs it."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    from align_ext import cli

    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()
    sys.exit()
