"""`align-lora export`: writes an adapter as a folder of stock PEFT."""

from typing import Annotated

import typer

from align_ext.cli.app import Folder, Force, Model, Output, Task, app, on_models
from align_ext.system.terminal import continue_without_output, plain_console


@app.command()
def export(
    adapter: Folder,
    output: Output,
    model: Model = None,
    task: Task = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="read it with PEFT and align_ext and compare logits")
    ] = False,
    force: Force = False,
) -> None:
    """Writes an adapter as a folder of stock PEFT, with nothing of ours in it, for vLLM, llama.cpp and others too.

    The scaling is alpha / r in every layer; ranks that differ are filled with zeros up to the largest.

    m_lora and hydra without a router become one LoRA, the sum of their heads; a frozen offset doubles its rank;
    multi_adapter becomes one folder a task below the output, or one with --task. Routed adapters and those beside
    blocks have no such form. DoRA has one that PEFT alone reads, its own folder is it: merge it for others.

    With --verify the exit code is 1 if stock PEFT or align_ext compute other logits from the new folder.

    Example: align-lora export run/adapter --output peft_adapter --verify
    """
    continue_without_output()
    with on_models("exporting"):
        from align_ext.cli import convert

        passed = convert.export(convert.Request(adapter, model, output, task, force), verify, plain_console())
    if not passed:
        raise typer.Exit(1)
