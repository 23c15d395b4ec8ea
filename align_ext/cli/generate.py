"""`align-lora generate`: answers prompts with a trained adapter, or talks in the terminal."""

from typing import Annotated, Any

import typer

from align_ext.cli.app import Force, Model, Task, app, on_models
from align_ext.system.terminal import plain_console


@app.command()
def generate(
    folder: Annotated[
        str, typer.Argument(help="output folder of `train`, an adapter's folder, or a model's, as `merge` writes it")
    ],
    prompt: Annotated[str | None, typer.Option(help="what to answer; none: a conversation in the terminal")] = None,
    file: Annotated[str | None, typer.Option(help="file of one prompt a line, to answer each by itself")] = None,
    base: Annotated[
        bool, typer.Option("--base", help="show the answers of the base model too, which is then loaded twice")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(help="the longest answer in tokens")] = 256,
    temperature: Annotated[float, typer.Option(help="of sampling; 0: always the likeliest token")] = 0.0,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    task: Task = None,
    merge: Annotated[bool, typer.Option("--merge", help="merge the adapter before answering")] = False,
    model: Model = None,
    dtype: Annotated[str, typer.Option(help="auto, stored, float32, bfloat16 or float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto (a GPU if there is one), cpu or cuda")] = "auto",
    force: Force = False,
) -> None:
    """Answers prompts with a trained adapter; without a prompt it talks in the terminal, and streams what it says.

    A prompt goes through the tokenizer's chat template, or is followed by a line break, as in training. In a
    conversation each line is a turn; /reset forgets the turns before, /task NAME takes another task of a
    multi_adapter, /quit, Ctrl-C or the end of the input end it.

    Example: align-lora generate run --prompt "What is 17 + 25?" --base
    """
    given: dict[str, Any] = dict(locals())
    with on_models("generating"):
        from align_ext.cli.answer import AnswerRequest, run

        run(AnswerRequest.of(**given), plain_console())
