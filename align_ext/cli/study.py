"""`align-lora study`: from a question about architectures to a table with honest intervals."""

from pathlib import Path
from typing import Annotated

import typer

from align_ext.cli.app import UserError, app, on_models
from align_ext.system import processes
from align_ext.system.messages import shown_path
from align_ext.system.reading import exists
from align_ext.system.terminal import continue_without_output, plain_console, print_line, print_table

study_app = typer.Typer(
    name="study",
    help="Compares architectures: a design, one training run a cell, statistics and a report.\n\n"
    "align-lora study new mine --like quick; align-lora study run mine; align-lora study report mine",
    no_args_is_help=True,
    rich_markup_mode=None,
)
app.add_typer(study_app)


def _existing(folder: Path) -> Path:
    with on_models("a study"):
        if not exists(folder):
            raise UserError(f"there is no folder {shown_path(folder)}: `align-lora study new {folder}` begins a study")
        if not folder.is_dir():
            raise UserError(f"{shown_path(folder)} is a file: name the folder of a study")
    return folder


Folder = Annotated[Path, typer.Argument(help="folder of the study, which holds study.yaml", callback=_existing)]


@study_app.command("new")
def new(
    folder: Annotated[Path, typer.Argument(help="folder of the new study")],
    like: Annotated[
        str, typer.Option(help="preset, as `study presets` lists them, or the folder of a study to copy")
    ] = "quick",
) -> None:
    """Writes study.yaml, a preset or that of another study, to be edited."""
    with on_models("a study"):
        from align_ext.study.new import new_study

        file = new_study(folder, like)
    typer.echo(f"wrote {file}: edit it, then `align-lora study plan {folder}` and `align-lora study run {folder}`")


@study_app.command("presets")
def presets() -> None:
    """Lists the presets with the question that each asks."""
    with on_models("a study"):
        import yaml

        from align_ext.study.new import presets as texts

        for name, text in texts().items():
            typer.echo(f"{name:<16} {yaml.safe_load(text)['question']}")


@study_app.command("plan")
def plan(folder: Folder) -> None:
    """Shows arms, ranks, parameters, rows and cost before anything runs, and what would spoil the comparison."""
    with on_models("a study"):
        from align_ext.study import show
        from align_ext.study.design import read_study
        from align_ext.study.plan import store_plan
        from align_ext.study.run import statuses

        study = read_study(folder)
        made = store_plan(folder, study)
        found = statuses(folder)
        console = plain_console()
        print_table(console, show.arms_table(made))
        print_table(console, show.rows_table(made))
        for text in show.remarks(folder, made, found):
            print_line(console, text)


@study_app.command("run")
def run(
    folder: Folder,
    jobs: Annotated[int, typer.Option(help="cells at a time, each with GPUs of its own or cores")] = 1,
    nproc: Annotated[int, typer.Option(help="processes that train and score a cell together")] = 1,
    shard: Annotated[str, typer.Option(help="i/n: every n-th cell from the i-th on, for a job array")] = "1/1",
    arms: Annotated[str, typer.Option(help="only these arms, separated by commas")] = "",
    retry: Annotated[bool, typer.Option("--retry", help="run failed cells again")] = False,
    write: Annotated[
        bool, typer.Option("--report/--no-report", help="list the failed cells and write the report at the end")
    ] = True,
) -> None:
    """Runs every cell that is missing, then writes the report; interrupted at any moment, it goes on where it was.

    Any number of processes and machines that share the folder may run it at once. Exit code 1: a cell of those that
    this command was to run (--shard, --arms) failed, or is not done though no other process works on it.
    """
    continue_without_output()
    part, _, parts = shard.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise UserError(f"--shard {shard!r} must be i/n with 1 <= i <= n, as 3/16")
    with on_models("a study"):
        from align_ext.base_model.dtypes import usable_device
        from align_ext.study.design import read_study
        from align_ext.study.run import run as run_study

        chosen = tuple(filter(None, (name.strip() for name in arms.split(","))))
        which, study = (int(part), int(parts)), read_study(folder)
        with processes.joined(usable_device(study.train.get("device", "auto"))):
            first = processes.number() == 0
            console = plain_console(quiet=not first)
            found = run_study(folder, study, console, jobs=jobs, nproc=nproc, shard=which, arms=chosen, retry=retry)
    if not first:
        return
    failed = [one for one in found if one.state == "failed"]
    if write:
        for one in failed:
            print_line(console, f"{one.key} failed: {one.detail}")
        if any(one.state == "done" for one in found):
            report(folder)
    if failed or any(one.state in ("missing", "interrupted", "damaged") for one in found):
        raise typer.Exit(1)


@study_app.command("status")
def status(folder: Folder) -> None:
    """Shows which cells are done, running, failed or missing."""
    with on_models("a study"):
        from align_ext.study import show
        from align_ext.study.plan import stale
        from align_ext.study.run import statuses

        console, found = plain_console(), statuses(folder)
        if line := stale(folder):
            print_line(console, line)
        print_table(console, show.status_table(found))


@study_app.command("published")
def published() -> None:
    """Shows the parameter counts that the papers print beside those of their configurations, without any weights."""
    with on_models("a study"):
        from align_ext.study.published import show as show_published

        show_published(plain_console())


@study_app.command("report")
def report(folder: Folder) -> None:
    """Writes report/: report.html, report.md, tables and figures, from the cells that are done."""
    with on_models("a report"):
        from align_ext.report.page import write_report
        from align_ext.study.plan import stale

        if line := stale(folder):
            print_line(plain_console(), line)
        typer.echo(f"wrote {write_report(folder)}")
