"""A run's output folder: claimed from the start, and at any moment a finished run or one that can go on.

A run works in its output folder, where each part appears when it is complete: checkpoints/, adapter/, losses.png, and
at last results.json. Where a run is to be overwritten, it works in a hidden folder beside, which takes the other's
place in one step at the end.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from align_ext.io.adapter_folder import ADAPTER_FILES, OUR_CONFIG
from align_ext.system.reading import read_yaml, shown
from align_ext.system.writing import (
    LOCK,
    InUse,
    atomic_file,
    claimed,
    exchange,
    foreign,
    give_back,
    is_fixed,
    remove,
    take_place,
    user_path,
)
from align_ext.training.options import TrainOptions
from align_ext.training.whole_checkpoints import OLD, WRITING, checkpoints, clear, damage, files_of, last_checkpoint

_CHECKPOINTS, _OPTIONS, _RESULTS, _ADAPTER = "checkpoints", "options.yaml", "results.json", "adapter"
_DATA, _TOKENS = "data_digest", "tokens_digest"
_MARK = ".overwrites"  # in the folder of a run that is to take another's place
_LEFT = rf"\.(results|losses)\..*|{_CHECKPOINTS}/\.{_OPTIONS}-.*"  # of a run that was killed as it wrote them
# What a run that goes on may do otherwise: nothing of it reaches the adapters.
_FREE = {"output", "overwrite", "resume", "save_steps", "log_steps", "eval_batch_size"}
_MEASURED = {"dtype", "device"}  # which "auto" chooses anew each time


@dataclass
class RunFolder:
    """A run's folder, claimed.

    Attributes:
        target: where the results are to be.
        path: where the run works: the target, or beside it as long as a run that it overwrites is there.
        options: the run's options; of one that goes on with the dtype and the device that it had.
        checkpoint: the one to go on from.
        keep: whether the run has come to something.
    """

    target: Path
    path: Path
    options: TrainOptions
    checkpoint: Path | None = None
    keep: bool = False

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.path / _CHECKPOINTS

    def last_checkpoint(self) -> Path | None:
        """The last checkpoint that is whole."""
        return last_checkpoint(self.checkpoints)

    def begin(self, dtype: str, device: str, data: str, tokens: str) -> None:
        """Writes down what the run is, so that it can go on; or checks that it goes on with the same.

        Args:
            dtype: of the base model.
            device: where it runs.
            data: a digest of all examples.
            tokens: a digest of what the tokenizer made of them, labels among it.

        Raises:
            ValueError: the run that is to go on had other data, or its tokenizer or chat template made other tokens.
        """
        file = self.checkpoints / _OPTIONS
        if self.checkpoint is not None:
            before, here = read_yaml(file), shown(str(self.target))
            if before.get(_DATA) != data:
                raise ValueError(f"the data of the run in {here} was other: it cannot go on with this")
            if before.get(_TOKENS, tokens) != tokens:  # runs of earlier versions have none
                raise ValueError(
                    f"the run in {here} had other tokens of the same data, so that the model's tokenizer or chat "
                    "template has changed: put it back as it was, or start another run"
                )
            return
        self.checkpoints.mkdir(exist_ok=True)
        options = self.options.to_dict() | {"dtype": dtype, "device": device, _DATA: data, _TOKENS: tokens}
        with atomic_file(file) as new:
            new.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


@contextmanager
def open_run(options: TrainOptions) -> Iterator[RunFolder]:
    """Claims the output folder: new, empty, a run's to overwrite, or an interrupted run's to resume.

    At the end a run that has come to something is at its target; of another only whole checkpoints stay.

    Raises:
        ValueError: it cannot be made, is not free, or another process has it; or there is nothing to go on from, or
            that was of other options.
    """
    with ExitStack() as held:
        target = _free_name(held) if options.output is None else _named(options, held)
        beside = target.parent / f".{target.name}.new"
        held.callback(remove, beside, "(?!)")  # where it is empty in the end
        if os.path.isdir(beside):
            held.enter_context(claimed(beside))
            if not (beside / _MARK).exists():  # killed after its last step, the exchange: this is the other run
                _discard(beside, target)
            elif (beside / _RESULTS).is_file():  # killed before it
                _replace(beside, target)
        (target / _MARK).unlink(missing_ok=True)
        folder = _interrupted(options, target, beside) if options.resume else _fresh(options, target, beside, held)
        try:
            yield folder
        finally:
            _close(folder)


def _free_name(held: ExitStack) -> Path:
    """The first folder of align_lora_run[-N] that is not there, or holds nothing but what a dead run left."""
    for name in ("align_lora_run", *(f"align_lora_run-{n}" for n in range(2, 10_000))):
        path = Path(name)
        if os.path.lexists(path) and not (path / LOCK).is_file():
            continue
        with suppress(InUse), ExitStack() as attempt:
            attempt.enter_context(claimed(path))
            if _is_empty(path):
                held.push(attempt.pop_all())
                return path
    raise ValueError("there are too many folders align_lora_run-N: name one with --output")


def _named(options: TrainOptions, held: ExitStack) -> Path:
    output = options.output or ""
    path = user_path(output, "--output")
    if not output.strip():
        raise ValueError(f"output={shown(output)} is empty: name a folder")
    if options.resume and not path.is_dir():
        raise ValueError(f"{shown(output)} holds no checkpoint to resume from: --save-steps writes them")
    held.enter_context(claimed(path))
    return Path(os.path.realpath(path)) if path.is_symlink() or path.name in ("", "..") else path


def _fresh(options: TrainOptions, target: Path, beside: Path, held: ExitStack) -> RunFolder:
    """The folder of a run from the start."""
    waiting = bool(checkpoints(beside / _CHECKPOINTS))
    if _is_empty(target) and not waiting:
        remove(target, _files_of_run(target))
        return RunFolder(target, target, options)
    if not options.overwrite:
        cure = "--overwrite, or another --output"
        if waiting or (last_checkpoint(target / _CHECKPOINTS) and not (target / _RESULTS).is_file()):
            cure = "--resume to go on with its run, " + cure
        raise ValueError(f"the output folder {shown(str(options.output))} is not empty: use {cure}")
    for folder in (target, beside):
        if stranger := foreign(folder, _files_of_run(folder)):
            raise ValueError(
                f"the output folder {shown(str(options.output))} holds {shown(stranger)}, which no run has written: "
                "--overwrite replaces nothing but runs; choose another --output"
            )
    if is_fixed(target):
        raise ValueError(f"the run in {shown(str(options.output))} cannot be replaced in one step (a mount point, the "
                         "current folder, or in one that is read-only): choose another --output")  # fmt: skip
    held.enter_context(claimed(beside))
    remove(beside, _files_of_run(beside))
    (beside / _MARK).touch()
    return RunFolder(target, beside, options)


def _interrupted(options: TrainOptions, target: Path, beside: Path) -> RunFolder:
    """The folder of a run that goes on."""
    if options.output is None:
        raise ValueError("--resume goes on with the run in a folder: name it with --output")
    path = beside if last_checkpoint(beside / _CHECKPOINTS) else target
    if (path / _RESULTS).is_file():
        raise ValueError(f"the run in {shown(options.output)} is complete: there is nothing to resume")
    last = last_checkpoint(path / _CHECKPOINTS)
    if last is None:
        broken = [f"{c.name} is not whole: {damage(c)}" for c in checkpoints(path / _CHECKPOINTS)[-1:]]
        reason = broken[0] if broken else "--save-steps writes them"
        raise ValueError(f"{shown(options.output)} holds no checkpoint to resume from: {reason}")
    stored = read_yaml(path / _CHECKPOINTS / _OPTIONS)
    before = TrainOptions.from_mapping({name: value for name, value in stored.items() if name not in (_DATA, _TOKENS)})
    given = options.to_dict()
    for name, value in before.to_dict().items():
        measured = name in _MEASURED and given[name] == "auto"
        if name not in _FREE and given[name] != value and not measured:
            raise ValueError(
                f"the run in {shown(options.output)} had {name}={value!r}, not {shown(given[name])}: give the same "
                "options to resume it"
            )
    remove(path, _LEFT)
    return RunFolder(target, path, replace(options, dtype=before.dtype, device=before.device), last)


def _close(folder: RunFolder) -> None:
    """Leaves a finished run at its target, or checkpoints, or nothing of ours."""
    clear(folder.checkpoints)
    if not folder.keep:
        if not checkpoints(folder.checkpoints):
            remove(folder.path, _files_of_run(folder.path))
        return
    if not folder.options.save_steps:
        remove(folder.checkpoints, _files_of_checkpoints(folder.checkpoints))
    if folder.path != folder.target:
        _replace(folder.path, folder.target)


def _replace(beside: Path, target: Path) -> None:
    """Puts a complete run into the place of another, of which only what is not ours stays; both are claimed."""
    take_place(beside, target)
    exchange(beside / LOCK, target / LOCK)
    (target / _MARK).unlink(missing_ok=True)
    _discard(beside, target)


def _discard(beside: Path, target: Path) -> None:
    """Removes a run that has been replaced, of which only what is not ours goes on to the other."""
    ours = _files_of_run(beside)
    give_back(beside, target, ours)
    remove(beside, ours)


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing but what a run that came to nothing left."""
    something = (folder / _RESULTS).exists() or (folder / _ADAPTER / OUR_CONFIG).exists()
    return not something and not checkpoints(folder / _CHECKPOINTS) and foreign(folder, _files_of_run(folder)) is None


def _files_of_run(folder: Path) -> str:
    """A regular expression of a run's files by their paths in its folder, those of a run that died among them."""
    own = rf"{_RESULTS}|losses\.png|{re.escape(_MARK)}|{_LEFT}|{_ADAPTER}/({ADAPTER_FILES})|\.{_ADAPTER}-[^/]*\.new/.*"
    return rf"{own}|{_CHECKPOINTS}/({_files_of_checkpoints(folder / _CHECKPOINTS)})"


def _files_of_checkpoints(folder: Path) -> str:
    whole = (rf"{path.name}/({files_of(path) or '(?!)'})" for path in checkpoints(folder))
    return "|".join([rf"\.?{_OPTIONS}(-.*)?", rf"({re.escape(WRITING)}|{re.escape(OLD)})/.*", *whole])
