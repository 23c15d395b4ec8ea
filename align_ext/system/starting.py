"""Handles signals while the command still imports torch: it ends with one line. Must be imported first."""

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end(number: int, _: object) -> None:
    """Ends the process at once: it has not written anything yet."""
    reason = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    os.write(2, f"align-lora: {reason}\n".encode())
    os._exit(128 + number)


if os.path.basename(sys.argv[0]) == "align-lora" or sys.orig_argv[1:3] == ["-m", "align_ext.cli"]:
    for _number in SIGNALS:
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, end)
