"""`align-lora report`: writes the report of a finished training run again."""

from pathlib import Path
from typing import Annotated

import typer

from align_ext.cli.app import app, on_models


@app.command()
def report(run: Annotated[Path, typer.Argument(help="output folder of `train`, which holds results.json")]) -> None:
    """Writes report.html into a run's folder: losses, tasks, alignment, routing, answers, checks, on one page.

    `train` does so at its end; the report is made of the folder's files alone, without the model.

    Example: align-lora report run
    """
    with on_models("a report"):
        from align_ext.report.run_page import write_run_report

        typer.echo(f"wrote {write_run_report(run)}")
