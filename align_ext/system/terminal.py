"""The terminal: what is printed is printed as it is, since names out of files may look like rich's markup.

A reader that goes away or a log's disk that is full ends what is printed. It ends the command too where that is all it
makes, and never one that writes files.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text

from align_ext.system.reading import reason_of


class OutputLost(BaseException):
    """Standard output takes no more, and the command makes nothing else; no handler of errors is to keep it going."""


class Output:
    """A standard stream whose first failure is its last: what comes after it goes nowhere.

    Attributes:
        lost: the failure.
        needed: raise OutputLost then.
    """

    def __init__(self, stream: Any, *, needed: bool) -> None:
        self.stream, self.needed = stream, needed
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes a text."""
        self._do(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Writes what waits."""
        self._do(self.stream.flush)

    def _do(self, what: Any, *args: str) -> None:
        try:
            what(*args)
        except OSError as error:
            self.lost = self.lost or error
            with suppress(OSError, ValueError):  # what waits in buffers, also of libraries in C, goes there too
                nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                os.dup2(nowhere, self.stream.fileno())
                os.close(nowhere)
        if self.lost is not None and self.needed:
            raise OutputLost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guarded(run: Callable[[], int]) -> int:
    """Runs a command with both standard streams guarded; returns its exit code, or what says that its output is lost.

    That is 141 without a word where its reader has gone, as of other tools, and else 2.
    """
    before, ended = (sys.stdout, sys.stderr), 128 + signal.SIGPIPE
    output, errors = Output(sys.stdout, needed=True), Output(sys.stderr, needed=False)
    sys.stdout, sys.stderr = (None if guard.stream is None else guard for guard in (output, errors))
    try:
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OutputLost:
        code = ended
    finally:
        if output.lost is not None and output.lost.errno != errno.EPIPE:
            print(f"align-lora: standard output cannot be written: {reason_of(output.lost)}", file=sys.stderr)
        sys.stdout, sys.stderr = before
    return 2 if code == ended and output.lost is not None and output.lost.errno != errno.EPIPE else code


def outlive_output() -> None:
    """From now on the command goes on when standard output is lost: it writes files."""
    if isinstance(sys.stdout, Output):
        sys.stdout.needed = False


def plain_console() -> Console:
    """A console that knows no markup and no codes of emoji; what is to have a style is a rich Text."""
    return Console(markup=False, emoji=False)


def print_line(console: Console, line: str) -> None:
    """Prints a line as it is."""
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def working(console: Console, what: str) -> Status:
    """Shows, as long as a block runs, what is done."""
    return console.status(Text(what))  # of a string rich would make markup


def bars_on(console: Console) -> Progress:
    """Progress bars, on a terminal alone."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
