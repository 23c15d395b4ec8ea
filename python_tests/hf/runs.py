"""The training job in this process on a tiny model."""

import io

from rich.console import Console

from align_ext.training import recipe
from align_ext.training.options import TrainOptions
from align_ext.training.run_folder import open_run


def options(place, **changed):
    values = {
        "model": str(place / "model"),
        "data": str(place / "rows.jsonl"),
        "output": "out",
        "steps": 12,
        "lr": 2e-2,
        "eval_examples": 4,
        "log_steps": 3,
        "dtype": "float32",
        "device": "cpu",
    }
    return TrainOptions.from_mapping(values | changed)


def console():
    return Console(file=io.StringIO(), width=200)


def run(place, **changed):
    out = console()
    with open_run(options(place, **changed)) as folder:
        results = recipe.train(recipe.prepare(folder, out), out)
    return results, out.file.getvalue()


def prepare(place, said=None, **changed):
    """A job whose claim on its folder is not kept."""
    with open_run(options(place, **changed)) as folder:
        return recipe.prepare(folder, said or console())
