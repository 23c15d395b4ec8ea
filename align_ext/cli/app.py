"""The command line of all commands; a user's error becomes one line on stderr and exit code 2."""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from align_ext.system import ending, processes
from align_ext.system.messages import line
from align_ext.system.terminal import run_guarded

app = typer.Typer(
    name="align-lora",
    help="Multi-task LoRA training with alignment losses.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# Arguments of several commands.
Folder = Annotated[str, typer.Argument(help="folder of save_adapter or `train` (its adapter/), or of stock PEFT")]
Model = Annotated[str | None, typer.Option(help="base model: folder or hub id; none: the one the adapter names")]
Output = Annotated[str, typer.Option(help="new or empty folder for the result; it appears only when it is complete")]
Task = Annotated[
    str | None, typer.Option(help="multi_adapter, moelora, mtlora_cvpr: name or number (from 0) of the task")
]
Force = Annotated[bool, typer.Option("--force", help="go on where the adapter belongs to another base model")]

_IN_ONE_PROCESS = ("merge", "export", "generate", "inspect", "report")
_INTERRUPTED = 130  # the exit code of shells and typer for Ctrl-C


class UserError(Exception):
    """An error that the user can fix; the message is complete and needs no traceback."""


@contextmanager
def on_models(what: str) -> Iterator[None]:
    """Turns errors of a block that works on a model and an adapter into UserErrors."""
    try:
        with on_transformers(what):
            yield
    except (ValueError, OSError) as error:
        raise UserError(
            str(error).replace("approximate='uniform'", "--approximate uniform").replace("force=True", "--force")
        ) from error


@contextmanager
def on_transformers(what: str) -> Iterator[None]:
    """Makes transformers quiet for a block that needs it; raises UserError if a package is missing."""
    try:
        import transformers

        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.logging.set_verbosity_error()
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what} needs {error.name}: pip install 'align_ext[train]'") from error


def _show_version(wanted: bool) -> None:
    if wanted:
        from align_ext import __version__

        typer.echo(f"align-lora {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    if context.invoked_subcommand in _IN_ONE_PROCESS and processes.started() > 1:
        raise UserError(f"{context.invoked_subcommand} is the work of one process: start it without torchrun")


def main() -> None:
    """Runs the command line and exits."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a name may hold characters that the terminal cannot show
    code = run_guarded(_run)
    ending.stop_listening()
    sys.exit(code)


def _run() -> int:
    """Runs the command line, prints errors, and returns the exit code."""
    ending.listen()  # before slow imports
    try:
        code = app(standalone_mode=False, prog_name="align-lora")
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except processes.FailedElsewhere:  # where it is reported
        code = 2
    except Exception as error:
        # typer's errors (unknown flags, missing values) have no common public class in all its versions.
        foreseen = isinstance(error, UserError) or hasattr(error, "format_message")
        if not foreseen and ending.received() and processes.started() > 1:
            code = _INTERRUPTED  # another process was sooner at its end, by the same signal, and cannot be reached
        elif not foreseen:
            raise
        else:
            text = error.format_message() if hasattr(error, "format_message") else str(error)
            # A process that has joined others may be the only one with its error.
            _report("error: " + line(text, 800), alone=processes.have_joined())
            code = 2
    ended = ending.received()
    if code == _INTERRUPTED and ended is not None and ended != signal.SIGINT:
        _report(f"ended by {ended.name}")
        code = 128 + ended
    elif code == _INTERRUPTED:
        _report("interrupted")
    return code if isinstance(code, int) else 0


def _report(message: str, *, alone: bool = False) -> None:
    """Prints a message, of several processes only in the first one, if the others do not have another."""
    if alone or os.environ.get("RANK", "0") == "0":
        print(f"align-lora: {message}", file=sys.stderr)
