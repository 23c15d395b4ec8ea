"""`align-lora doctor`: tests this installation, or the gradients of a model."""

from typing import Annotated

import typer

from align_ext.cli.app import UserError, app, on_models
from align_ext.system.terminal import plain_console


@app.command()
def doctor(
    grad_check: Annotated[
        bool, typer.Option("--grad-check", help="check that the losses reach every adapted layer of a model")
    ] = False,
    model: Annotated[str | None, typer.Option(help="with --grad-check: a folder or hub id [a tiny one]")] = None,
) -> None:
    """Shows versions and devices, and tests every operator on each device; exit code 1 if something is broken.

    With --grad-check: does the alignment reach every layer, under each mode of activation checkpointing?
    """
    if model is not None and not grad_check:
        raise UserError("--model goes with --grad-check")
    if grad_check:
        with on_models("the gradient check"):
            from align_ext.cli.check_modes import check_modes

            passed = check_modes(model, plain_console())
    else:
        from align_ext.diagnostics.doctor import run

        passed = run()
    raise typer.Exit(0 if passed else 1)
