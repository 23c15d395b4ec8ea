"""`align-lora train`: fine-tunes a language model on several tasks."""

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from typer.core import TyperCommand

from align_ext.cli.app import UserError, app, on_models, on_transformers
from align_ext.data.rows import ROWS
from align_ext.system import processes
from align_ext.system.messages import reason_of
from align_ext.system.reading import read_yaml
from align_ext.system.terminal import continue_without_output, plain_console, print_line
from align_ext.training.option_values import alternatives, is_repeated
from align_ext.training.options import TrainOptions, known_options


def train(config: str | None, print_config: bool, dry_run: bool, **flags: Any) -> None:
    """Fine-tunes a language model on several tasks; with no options a small one on five built-in tasks.

    It scores the model on held-out examples before and after, saves the adapter as a PEFT folder, checks that stock
    PEFT and the merged model compute the same, and shows what happened on one page, report.html. Without a GPU and
    without the hub the default run takes a few minutes.
    """
    options = given_options(config, flags)
    if print_config:
        typer.echo(yaml.safe_dump(options.to_dict(), sort_keys=False), nl=False)
        return
    if dry_run:
        with on_models("reading data"):
            from align_ext.cli.show_data import show_data

            show_data(options, None, plain_console())
        return
    continue_without_output()
    with on_transformers("training"):
        from align_ext.base_model.checks import CannotRun
        from align_ext.base_model.dtypes import usable_device
        from align_ext.training import recipe
        from align_ext.training.model_card import push
        from align_ext.training.run_folder import open_shared_run

    with ExitStack() as stack:
        try:
            stack.enter_context(processes.joined(usable_device(options.device)))
            console = plain_console(quiet=processes.number() > 0)
            options = options.for_processes(processes.count())
            job = recipe.prepare(stack.enter_context(open_shared_run(options)), console)
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
        try:
            results = recipe.train(job, console)
            if processes.number() == 0:
                _write_report(job.folder, console)
                if options.push_to_hub:  # after all else, since it may fail
                    print_line(console, f"uploaded to {push(job.folder.path / 'adapter', job.folder.target, options)}")
        except FloatingPointError as error:  # the training diverged, in all processes alike
            raise (UserError if processes.number() == 0 else processes.FailedElsewhere)(str(error)) from error
        except (OSError, CannotRun) as error:  # the disk is full, say
            raise UserError(str(error)) from error
    if any(check["passed"] is False for check in results["checks"].values()):
        raise typer.Exit(1)


def _write_report(folder: Any, console: Console) -> None:
    """Writes the report of a finished run; if that fails, the run is as good without."""
    try:
        from align_ext.report.run_page import REPORT, write_run_report

        write_run_report(folder.path)
        print_line(console, f"report: {folder.target / REPORT}")
    except ModuleNotFoundError as error:
        print_line(console, f"no report: it needs {error.name}: pip install 'align_ext[train]', then align-lora report")
    except Exception as error:  # also a bug of ours
        print_line(console, f"no report: {reason_of(error)} (align-lora report {folder.target} tries again)")


def given_options(config: str | None, flags: Mapping[str, Any]) -> TrainOptions:
    """Returns the options of a configuration file, which flags override.

    Raises:
        UserError: they cannot be used.
    """
    try:
        given = read_yaml(config) if config is not None else {}
        return TrainOptions.from_mapping(given, {name: x for name, x in flags.items() if x is not None})
    except ValueError as error:
        raise UserError(str(error)) from error


def flag(
    name: str, kind: Any, text: str, default: Any = None, also: str | None = None, group: str = "Options"
) -> inspect.Parameter:
    """Returns a parameter that typer reads as a flag; also: another name for it, that of TrainingArguments."""
    names = [] if also in (None, name) else [f"--{word.replace('_', '-')}" for word in (name, also) if word]
    annotation = Annotated[kind, typer.Option(*names, help=text, show_default=False, rich_help_panel=group)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def option_flags() -> list[inspect.Parameter]:
    """Returns a flag for a configuration file, and one for each option in training/options.py."""
    flags = [flag("config", str | None, "YAML file of these options; flags override it")]
    for name, option in known_options().items():
        kinds = alternatives(option.kind)
        kind = bool if bool in kinds else option.kind if option.kind in (int, float) else str  # "none", "auto", lists
        kind = list[str] if is_repeated(option.kind) else kind
        value = ",".join(option.default) if isinstance(option.default, tuple) else option.default
        shown = "" if value in (None, "", False, {}) else f" [{value}]"
        flags.append(
            flag(name, kind | None, option.help.removesuffix(".") + shown, also=option.argument, group=option.group)
        )
    return flags


class GroupedCommand(TyperCommand):
    """A command whose --help shows its options under the names of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Writes a section for each group."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or "Options", []).append(record)
        for group, records in groups.items():
            with formatter.section(group):
                formatter.write_dl(records)


def take_flags(command: Any, flags: list[inspect.Parameter]) -> None:
    """Makes typer see flags in place of the parameters of a command."""
    command.__signature__ = inspect.Signature(flags)
    command.__annotations__ = {flag.name: flag.annotation for flag in flags}


_config, *_options = option_flags()
_own = [
    flag("print_config", bool, "print the options as such a file, and stop", default=False),
    flag("dry_run", bool, "show the data as `align-lora data` does, and stop", default=False),
]
take_flags(train, [_config, *_own, *_options])
_ROWS = "\n\n".join(f"{columns}: {meaning}" for columns, meaning in ROWS)
_DATA = (
    "Columns of the rows of --data. A JSON integer counts as text; anything else that is no text is refused, and so is "
    "every other column, unless it holds a number, is named like id, source or category, or --ignore-columns names it."
)
app.command(cls=GroupedCommand, help=f"{inspect.getdoc(train)}\n\n{_DATA}\n\n{_ROWS}")(train)
