"""What commands take from the folder of a finished run: its held-out rows, its model as it was stored, its adapter."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from align_ext.base_model.dtypes import usable_device
from align_ext.data.named_source import NamedSource, named_sources
from align_ext.data.sources import split_named
from align_ext.data.tasks import Pools, TaskData, row_ids
from align_ext.evaluation.scored_model import ModelRequest
from align_ext.report.run_results import Run, read_run
from align_ext.system.messages import shown
from align_ext.system.reading import exists
from align_ext.system.writing import user_path
from align_ext.training.base import load_job_base
from align_ext.training.in_words import stored_bits
from align_ext.training.options import TrainOptions
from align_ext.training.rows import choose

OF_THE_RUN = ("data", "columns", "ignore_columns", "tasks", "examples", "seq_len")
"""The options of `align-lora eval` that a run decides."""


def read_finished(folder: str) -> tuple[Run, TrainOptions]:
    """Reads a finished run and its options.

    Raises:
        ValueError: the folder holds no finished run, or its options are not those of this version.
    """
    run = read_run(user_path(folder, "--run"))
    return run, TrainOptions.from_mapping(run.options)


def with_run(given: Mapping[str, Any], run: Run, options: TrainOptions) -> dict[str, Any]:
    """Returns the options of `align-lora eval` with those that the run decides, and its model, adapter and dtype.

    Raises:
        ValueError: an option is given that the run decides.
    """
    for name in OF_THE_RUN:
        if name in given:
            raise ValueError(f"--run scores the rows that the run held out: leave --{name.replace('_', '-')} out")
    filled: dict[str, Any] = {"model": options.model, "adapter": str(Path(given["run"], "adapter"))}
    filled |= {name: getattr(options, "eval_examples" if name == "examples" else name) for name in OF_THE_RUN}
    found = {**filled, **given, "dtype": _dtype(run, given)}
    return {**found, "adapter": None if found["adapter"] == "none" else found["adapter"]}


def _dtype(run: Run, given: Mapping[str, Any]) -> str:
    """Returns the dtype of a request: that of the run if none is given."""
    own = str(run.results["model"]["dtype"]).removeprefix("torch.")
    return own if given.get("dtype", "auto") == "auto" else str(given["dtype"])


def as_stored(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields run and dtype of a request that answers as a run's model did, on its quantised base.

    There are none if the base was not quantised, or is to be merged into.
    """
    options = _options_of(str(folder / "adapter"))
    if not stored_bits(options) or given["merge"]:
        return {}
    run, found = read_finished(str(folder))
    return {"run": found, "dtype": _dtype(run, given)}


def load_run_base(request: ModelRequest, options: TrainOptions) -> tuple[Any, Any]:
    """Loads the base model of a request as a run with these options did, quantised if it was."""
    return load_job_base(replace(options, model=request.model), request.dtype, usable_device(request.device))


def base_note(adapter: str) -> str:
    """Returns a line if the run of an adapter trained it on a quantised base, which the caller does not load, or ""."""
    bits = stored_bits(_options_of(adapter))
    return bits and (
        f"the adapter was trained on its base model{bits}, and this is the base in floating point: answers and scores "
        "differ a little"
    )


def _options_of(adapter: str) -> Mapping[str, Any]:
    """Returns the options of the run that an adapter's folder belongs to, or none."""
    folder = Path(adapter).resolve().parent
    if not exists(folder / "results.json"):
        return {}
    try:
        return read_run(folder).options
    except (ValueError, KeyError):  # of another version, or of another program
        return {}


def held_out(run: Run, options: TrainOptions, pools: Pools, tokenizer: Any) -> TaskData:
    """Returns the data of a run, whose test examples are those that it scored.

    Raises:
        ValueError: they are others than those of the run.
    """
    data = replace(choose(options, pools, tokenizer), train=[])
    if run.ids and row_ids(data.test) != run.ids:
        raise ValueError(
            f"the rows that the run {shown(run.name)} held out are no longer those of its data: the files, or the "
            "model's tokenizer, have changed since then"
        )
    usage = {
        task: {split: of for split, of in splits.items() if split != "train"} for task, splits in data.usage.items()
    }
    return replace(data, usage=usage)


def trained_note(adapter: str, data: Any) -> str:
    """Returns a warning if the run of an adapter also trained on rows of the data that are scored, or ""."""
    try:
        sources = named_sources(_options_of(adapter).get("data"))
    except ValueError:  # of another version
        sources = ()
    trained = [Path(one.path).expanduser().resolve() for one in sources if _is_trained(one)]
    for source in named_sources(data):
        path = Path(source.path).expanduser().resolve()
        if _is_trained(source) and path.exists() and not {path, path.parent}.isdisjoint(trained):
            return (
                f"warning: the run of this adapter trained on rows of {shown(source.path)}: --run "
                f"{Path(adapter).resolve().parent} scores those that it held out"
            )
    return ""


def _is_trained(source: NamedSource) -> bool:
    """Whether a run may have trained on rows of a source: it is no file of another split."""
    return (source.split or split_named(Path(source.path).name)) in ("", "train")
