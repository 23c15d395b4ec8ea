"""Terminal output: text is printed without rich's markup, since names from files may look like markup.

When standard output is lost (a closed pipe, a full disk), nothing more is printed. A command that only prints then ends
too; a command that writes files goes on.
"""

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text

from align_ext.system.messages import reason_of

_WIDEST = 10_000  # columns of a table that goes to no terminal

PrintLine = Callable[[str], None]  # takes one line of progress


class OutputLost(BaseException):
    """Standard output is lost, and the command only prints; a BaseException, so that error handlers do not catch it."""


class Output:
    """A standard stream that discards all output after its first failure.

    Attributes:
        lost: the failure, or None.
        needed: whether a failure raises OutputLost.
    """

    def __init__(self, stream: Any, *, needed: bool) -> None:
        self.stream, self.needed = stream, needed
        self.lost: OSError | None = None

    def write(self, text: str) -> int:
        """Writes a text."""
        self._do(self.stream.write, text)
        return len(text)

    def flush(self) -> None:
        """Flushes the stream."""
        self._do(self.stream.flush)

    def _do(self, what: Any, *args: str) -> None:
        try:
            what(*args)
        except OSError as error:
            self.lost = self.lost or error
            with suppress(OSError, ValueError):  # redirects buffered output, also that of C libraries, to devnull
                devnull = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
                os.dup2(devnull, self.stream.fileno())
                os.close(devnull)
        if self.lost is not None and self.needed:
            raise OutputLost

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def run_guarded(run: Callable[[], int]) -> int:
    """Runs a command with both standard streams guarded; returns its exit code.

    If the output is lost, the code is 141 without a message when the reader closed the pipe, as usual, and else 2.
    """
    original, broken_pipe = (sys.stdout, sys.stderr), 128 + signal.SIGPIPE
    output, errors = Output(sys.stdout, needed=True), Output(sys.stderr, needed=False)
    sys.stdout, sys.stderr = (None if guard.stream is None else guard for guard in (output, errors))
    try:
        code = run()
        if sys.stdout is not None:
            sys.stdout.flush()
    except OutputLost:
        code = broken_pipe
    finally:
        if output.lost is not None and output.lost.errno != errno.EPIPE:
            print(f"align-lora: standard output cannot be written: {reason_of(output.lost)}", file=sys.stderr)
        sys.stdout, sys.stderr = original
    return 2 if code == broken_pipe and output.lost is not None and output.lost.errno != errno.EPIPE else code


def continue_without_output() -> None:
    """Lets the command go on when standard output is lost, because it writes files."""
    if isinstance(sys.stdout, Output):
        sys.stdout.needed = False


def plain_console(*, quiet: bool = False) -> Console:
    """Returns a console without markup and emoji codes, or one that prints nothing; styled text must be a rich Text."""
    return Console(markup=False, emoji=False, quiet=quiet)


def print_line(console: Console, line: str) -> None:
    """Prints a line without interpreting it."""
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def print_table(console: Console, table: Table) -> None:
    """Prints a table of which nothing is cut.

    On a terminal, what is too wide goes on in the next line of its cell; elsewhere the table is as wide as it must be.
    """
    for column in table.columns:
        column.overflow = "fold"
    width = console.width
    if not console.is_terminal:
        needed = console.measure(table, options=console.options.update(max_width=_WIDEST)).maximum
        console.width = max(width, needed)
    console.print(table)
    console.width = width


def show_status(console: Console, what: str) -> Status:
    """Shows a status text while a block runs."""
    return console.status(Text(what))  # rich would interpret a string as markup


class Bars(Progress):
    """Progress bars, below which stand the lines of a text."""

    note = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        """Returns the bars and the text."""
        yield from super().get_renderables()
        if self.note:
            yield Text(self.note, style="dim")


def progress_bars(console: Console) -> Bars:
    """Returns progress bars, which are shown only on a terminal."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Bars(*columns, console=console, transient=True, disable=not console.is_terminal)
