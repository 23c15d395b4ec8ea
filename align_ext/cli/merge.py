"""`align-lora merge`: writes a base model with an adapter merged into it."""

from typing import Annotated

import typer

from align_ext.cli.app import Folder, Force, Model, Output, Task, app, on_models
from align_ext.system.terminal import continue_without_output, plain_console


@app.command()
def merge(
    adapter: Folder,
    output: Output,
    model: Model = None,
    task: Task = None,
    approximate: Annotated[
        str | None, typer.Option(help="uniform: merge routed heads as if their router gave all the same weight")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option(help="file of one prompt a line, to measure the approximation on; none: four of ours")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="of the merged model: stored (as the base model is), float32, bfloat16 or float16")
    ] = "stored",
    force: Force = False,
) -> None:
    """Merges an adapter into its base model: writes an ordinary model folder, which needs neither PEFT nor align_ext.

    Exact (in float32, rounded once) for adapters without a router; of those with a part for each task (multi_adapter,
    moelora, mtlora_cvpr), for one task. Routed adapters (lora_moe, malora, hydra, r_lora, mtlora) weigh their heads
    anew for every token and cannot be merged exactly: --approximate uniform merges their mean and says how far the
    outputs moved (KL). Adapters beside whole blocks, and experts that are whole blocks (mixlora), cannot be merged.

    Example: align-lora merge run/adapter --model Qwen/Qwen2.5-0.5B --output merged
    """
    continue_without_output()
    with on_models("merging"):
        from align_ext.cli import convert

        request = convert.Request(adapter, model, output, task, force)
        convert.merge(request, approximate, prompts, dtype, plain_console())
