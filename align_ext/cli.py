"""The command line, align-lora: train, doctor. A user's mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import inspect
import signal
import sys
import warnings
from typing import Annotated, Any

import typer
import yaml

from align_ext.hf.options import TrainOptions, known_options, read_config

app = typer.Typer(
    name="align-lora",
    help="Multi-task LoRA training with alignment losses.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


_INTERRUPTED = 130  # what a shell reports for Ctrl-C, and typer returns


class Mistake(Exception):
    """Something that the user can put right; its message is the whole answer."""


def train(config: str | None, print_config: bool, **flags: Any) -> None:
    """Fine-tunes a language model on several tasks; with no options a small one on five built-in tasks.

    It scores the model on held-out examples before and after, saves the adapter as a PEFT folder, and checks that stock
    PEFT and the merged model compute the same. Without a GPU and without the hub the default run takes a few minutes.
    """
    try:
        given = read_config(config) if config is not None else {}
        options = TrainOptions.from_mapping(given | {name: x for name, x in flags.items() if x is not None})
    except ValueError as error:
        raise Mistake(str(error)) from error
    if print_config:
        typer.echo(yaml.safe_dump(options.to_dict(), sort_keys=False), nl=False)
        return
    try:
        import transformers

        from align_ext.hf import recipe
    except ModuleNotFoundError as error:
        raise Mistake(f"training needs {error.name}: pip install 'align_ext[train]'") from error
    from rich.console import Console

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a job that is ended cleans up, as on Ctrl-C
    console = Console()
    try:
        job = recipe.prepare(options, console)
    except ValueError as error:
        raise Mistake(str(error)) from error
    results = recipe.train(job, console)
    if any(check["passed"] is False for check in results["checks"].values()):
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """Shows versions and devices, and tests every operator on each device; exit code 1 if something is broken."""
    from align_ext.diagnostics import doctor as check

    raise typer.Exit(0 if check.run() else 1)


def _show_version(wanted: bool) -> None:
    if wanted:
        from align_ext import __version__

        typer.echo(f"align-lora {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show it.")] = False,
) -> None:
    pass


def _flags() -> list[inspect.Parameter]:
    """The flags of `train`: its own two and one for each option (hf/options.py), which so exists once."""

    def flag(name: str, kind: Any, text: str, default: Any = None) -> inspect.Parameter:
        annotation = Annotated[kind, typer.Option(help=text, show_default=False)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)

    flags = [
        flag("config", str | None, "YAML file of these options; flags override it"),
        flag("print_config", bool, "print the options as such a file, and stop", default=False),
    ]
    for name, option in known_options().items():
        kind = option.kind if option.kind in (bool, int, float) else str  # others may be "none", "auto" or a list
        value = ",".join(option.default) if isinstance(option.default, tuple) else option.default
        shown = "" if value in (None, "", False) else f" [{value}]"
        flags.append(flag(name, kind | None, option.help.removesuffix(".") + shown))
    return flags


train.__signature__ = inspect.Signature(_flags())  # type: ignore[attr-defined]
train.__annotations__ = {flag.name: flag.annotation for flag in _flags()}
app.command()(train)


def main() -> None:
    """Runs the command line and exits."""
    try:
        code = app(standalone_mode=False, prog_name="align-lora")
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        # typer's own errors (unknown flags, missing values) have no common public class over its versions.
        if not isinstance(error, Mistake) and not hasattr(error, "format_message"):
            raise
        text = error.format_message() if hasattr(error, "format_message") else str(error)
        print("align-lora: error: " + " ".join(text.split()), file=sys.stderr)
        code = 2
    if code == _INTERRUPTED:
        print("align-lora: interrupted", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)
