"""`align-lora eval`: scores a model on the tasks' test splits."""

from typing import Annotated, Any

import typer

from align_ext.cli.app import Force, app, on_models
from align_ext.system import processes
from align_ext.system.terminal import continue_without_output, plain_console


@app.command("eval")
def evaluate(
    run: Annotated[
        str | None,
        typer.Option(
            help="folder of a run of `train`: scores its adapter (--adapter none: its base) on the rows it held out"
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="folder or hub id; none: the adapter's base, or without one SmolLM2-135M-Instruct"),
    ] = None,
    adapter: Annotated[
        str | None, typer.Option(help="adapter folder of any architecture; none: the base alone")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="as in `train`, several times if wanted; none: the built-in tasks")
    ] = None,
    columns: Annotated[str | None, typer.Option(help="names that columns have in the sources, as in `train`")] = None,
    ignore_columns: Annotated[
        str | None, typer.Option(help="columns of the rows to leave out, separated by commas")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="names of the tasks to keep, separated by commas; none: all")
    ] = None,
    examples: Annotated[int | None, typer.Option(help="at most so many of each task; none: 100")] = None,
    batch_size: Annotated[int, typer.Option(help="rows in a forward")] = 16,
    seq_len: Annotated[
        int | None, typer.Option(help="longest prompt and answer in tokens; longer ones are left out; none: 256")
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="score the merged model")] = False,
    base: Annotated[
        bool, typer.Option("--base", help="score the base alone on the same rows too: paired differences to it")
    ] = False,
    task: Annotated[
        str | None, typer.Option(help="an adapter by task: name or number of the task as which it scores all tasks")
    ] = None,
    generate: Annotated[bool, typer.Option(help="generate answers too, which takes longer than likelihoods")] = True,
    dtype: Annotated[str, typer.Option(help="auto, stored, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda")] = "auto",
    force: Force = False,
    json: Annotated[str | None, typer.Option(help="file for the results")] = None,
) -> None:
    """Scores a model, with an adapter or without, on the tasks' test splits; data files are scored as they are.

    With --run it takes data, columns, tasks, lengths, model, dtype and adapter from a run and scores the rows that the
    run held out, as it read them.

    For each task, with standard errors: the loss per token of the gold answer; where there are choices, how often the
    gold one has the least loss per token; and the score of greedy answers, by the task's own scorer or else exact
    match. An adapter by task scores each task as that task. The file also holds each row's result by its id, and its
    greedy answer. With --base a second table has what the adapter changes, paired by row, with 95% intervals.

    Example: align-lora eval --adapter run/adapter --tasks syllogism,chain_sum --json scores.json
    """
    given: dict[str, Any] = {name: value for name, value in locals().items() if name != "json" and value is not None}
    for name in {"tasks", "columns", "ignore_columns"} & given.keys():
        given[name] = tuple(word.strip() for word in given[name].split(",") if word.strip())
    if data:
        given["data"] = data[0] if len(data) == 1 else data
    if json is not None:
        continue_without_output()
    with on_models("scoring"):
        from align_ext.base_model.dtypes import usable_device
        from align_ext.cli.score import request_of, score

        request = request_of(given)
        with processes.joined(usable_device(device)):
            score(request, json, plain_console(quiet=processes.number() > 0))
