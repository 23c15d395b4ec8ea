"""`align-lora data`: shows what a run would train and score on."""

import inspect
from typing import Any

from align_ext.cli.app import app, on_models
from align_ext.cli.train import GroupedCommand, flag, given_options, option_flags, take_flags
from align_ext.system.terminal import continue_without_output, plain_console


def data(config: str | None, json: str | None, **flags: Any) -> None:
    """Shows what `train` with the same options would train and score on, without the model's weights.

    For each task and split: rows, how many are used, why others are not, and the tokens of rows; the padding of the
    batches, and what packing would make of it; prompts that are both trained on and scored; and an example of each task
    with marks around what is learnt.

    Example: align-lora data --config run.yaml --json data.json
    """
    options = given_options(config, flags)
    if json is not None:
        continue_without_output()
    with on_models("reading data"):
        from align_ext.cli.show_data import show_data

        show_data(options, json, plain_console())


take_flags(data, [*option_flags(), flag("json", str | None, "file for the results")])
app.command(cls=GroupedCommand, help=inspect.getdoc(data))(data)
