"""The terminal: what is printed is printed as it is, since names out of files may look like rich's markup."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.status import Status
from rich.text import Text


def plain_console() -> Console:
    """A console that knows no markup and no codes of emoji; what is to have a style is a rich Text."""
    return Console(markup=False, emoji=False)


def say(console: Console, line: str) -> None:
    """Prints a line as it is."""
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)


def working(console: Console, what: str) -> Status:
    """Shows, as long as a block runs, what is done."""
    return console.status(Text(what))  # of a string rich would make markup


def bars_on(console: Console) -> Progress:
    """Progress bars, on a terminal alone."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
