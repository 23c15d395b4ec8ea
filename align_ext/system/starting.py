"""The command's first second or two, while it imports torch: a signal ends it with a line. Imported before all else."""

from __future__ import annotations

import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def end(number: int, _: object) -> None:
    """Ends at once: nothing has been made so far."""
    said = "interrupted" if number == signal.SIGINT else f"ended by {signal.Signals(number).name}"
    os.write(2, f"align-lora: {said}\n".encode())
    os._exit(128 + number)


if os.path.basename(sys.argv[0]) == "align-lora" or sys.orig_argv[1:3] == ["-m", "align_ext.cli"]:
    for _number in SIGNALS:
        if signal.getsignal(_number) is not signal.SIG_IGN:
            signal.signal(_number, end)
