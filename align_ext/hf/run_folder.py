"""A run's output folder: free to use, complete when it appears, and before that the checkpoints of a run to go on."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from transformers.trainer_utils import get_last_checkpoint

from align_ext.hf.options import TrainOptions
from align_ext.reading import read_yaml

_CHECKPOINTS, _OPTIONS, _RESULTS = "checkpoints", "options.yaml", "results.json"
# What a run that goes on may do otherwise: nothing of it reaches the adapters.
_FREE = {"output", "overwrite", "resume", "save_steps", "log_steps", "eval_batch_size"}


@dataclass(frozen=True)
class Target:
    """Where a run's results go: the folder, and the checkpoint to go on from."""

    path: Path
    checkpoint: Path | None = None


def find_target(options: TrainOptions) -> Target:
    """The output folder: new, empty, with overwrite a folder at all, or with resume that of the interrupted run.

    Raises:
        ValueError: it cannot be made or is not free; or there is nothing to go on from, or it was of other options.
    """
    if options.resume:
        return _interrupted(options)
    if options.output is None:
        names = ["align_lora_run", *(f"align_lora_run-{n}" for n in range(2, 10_000))]
        return Target(Path(next(name for name in names if not Path(name).exists())))
    target = Path(options.output).expanduser()
    if target.exists() and not target.is_dir():
        raise ValueError(f"the output {options.output!r} is a file")
    if target.is_dir() and any(target.iterdir()) and not options.overwrite:
        cure = "--overwrite, or another --output"
        if (target / _CHECKPOINTS).is_dir() and not (target / _RESULTS).is_file():
            cure = "--resume to go on with its run, " + cure
        raise ValueError(f"the output folder {options.output!r} is not empty: use {cure}")
    parent = next(p for p in target.absolute().parents if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise ValueError(f"the output folder {options.output!r} cannot be made: {error}") from error
    return Target(target)


def _interrupted(options: TrainOptions) -> Target:
    if options.output is None:
        raise ValueError("--resume goes on with the run in a folder: name it with --output")
    target = Path(options.output).expanduser()
    if (target / _RESULTS).is_file():
        raise ValueError(f"the run in {options.output!r} is complete: there is nothing to resume")
    checkpoints = target / _CHECKPOINTS
    last = last_checkpoint(checkpoints)
    if last is None:
        raise ValueError(f"{options.output!r} holds no checkpoint to resume from: --save-steps writes them")
    before = TrainOptions.from_mapping(read_yaml(checkpoints / _OPTIONS)).to_dict()
    for name, value in options.to_dict().items():
        if name not in _FREE and before[name] != value:
            raise ValueError(
                f"the run in {options.output!r} had {name}={before[name]!r}, not {value!r}: give the same options to "
                "resume it"
            )
    return Target(target, last)


def last_checkpoint(folder: Path) -> Path | None:
    """The latest checkpoint in a folder of them, if there is one."""
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    return None if found is None else Path(found)


@dataclass
class RunFolder:
    """A folder beside the target, and where the Trainer works: in the target where checkpoints are to survive."""

    path: Path
    trainer: Path
    keep: bool = False


@contextmanager
def new_folder(target: Target, options: TrainOptions) -> Iterator[RunFolder]:
    """A folder that takes the target's place at the end if `keep` is set, and vanishes otherwise.

    With save_steps the Trainer's checkpoints are in the target itself, from the first on; what it held before is gone.
    """
    place = target.path
    place.parent.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    checkpoints = place / _CHECKPOINTS
    folder = RunFolder(path, checkpoints if options.save_steps else path / "trainer")
    if options.save_steps and target.checkpoint is None:
        shutil.rmtree(place, ignore_errors=True)
        checkpoints.mkdir(parents=True)
        (checkpoints / _OPTIONS).write_text(yaml.safe_dump(options.to_dict(), sort_keys=False))
    try:
        yield folder
    finally:
        shutil.rmtree(path / "trainer", ignore_errors=True)
        if options.save_steps and last_checkpoint(checkpoints) is None:
            shutil.rmtree(place, ignore_errors=True)  # nothing to go on from
        if folder.keep:
            if checkpoints.is_dir() and (options.save_steps or target.checkpoint):
                checkpoints.rename(path / _CHECKPOINTS)
            _take_place(path, place)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _take_place(path: Path, place: Path) -> None:
    path.chmod(0o755)
    old = Path(tempfile.mkdtemp(prefix=f".{place.name}-old-", dir=place.parent))
    if place.exists():
        place.rename(old / "old")
    path.rename(place)
    shutil.rmtree(old, ignore_errors=True)
