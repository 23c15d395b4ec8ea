"""Manages a run's output folder, which at any moment holds a finished run or one that can be resumed.

A run works in its output folder, where each of these appears when it is complete: checkpoints/, adapter/,
rows.jsonl.gz, results.json, and report.html, which is made of them. A run that overwrites another one works in a
hidden folder next to it, and replaces it in one step at the end.
"""

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from align_ext.io.adapter_folder import OUR_CONFIG, adapter_files
from align_ext.io.model_card import CARD
from align_ext.system import processes
from align_ext.system.locks import LOCK, InUse, claimed
from align_ext.system.messages import shown
from align_ext.system.reading import read_yaml
from align_ext.system.writing import (
    atomic_file,
    exchange,
    first_foreign_file,
    is_fixed,
    move_foreign_files,
    remove,
    rename_into_place,
    user_path,
)
from align_ext.training.options import TrainOptions
from align_ext.training.whole_checkpoints import OLD, WRITING, checkpoints, clean, damage, files_of, last_checkpoint

_CHECKPOINTS, _OPTIONS, _RESULTS, _ADAPTER = "checkpoints", "options.yaml", "results.json", "adapter"
_DATA, _TOKENS = "data_digest", "tokens_digest"
_MARK = ".overwrites"  # a file in the folder of a run that will replace another one
# What a killed run leaves.
_TEMP = rf"\.(results|report|losses|rows)\..*|{_ADAPTER}/\.{CARD}-.*|{_CHECKPOINTS}/\.{_OPTIONS}-.*"
# Options that may differ when a run is resumed, since they do not affect the adapters.
_CHANGEABLE = {
    "output", "overwrite", "resume", "save_steps", "save_total_limit", "log_steps", "eval_batch_size", "report_to",
    "run_name", "dataloader_num_workers", "checks", "push_to_hub", "hub_model_id", "hub_private_repo", "fsdp",
    "fsdp_config", "deepspeed",
}  # fmt: skip
_DIVIDING = ("fsdp", "deepspeed")  # of which the value may differ, but not whether it is given
_AUTOMATIC = {"dtype", "device"}  # options that "auto" chooses again in each run


@dataclass
class RunFolder:
    """The claimed folder of a run.

    Attributes:
        target: the folder for the results.
        path: the folder in which the run works: the target, or a hidden one while the target holds an overwritten run.
        options: the run's options; a resumed run has its earlier dtype and device.
        checkpoint: the checkpoint to resume from, or None.
        keep: whether the run has saved its adapter, so that its files are kept.
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
        """Returns the last complete checkpoint, or None."""
        return last_checkpoint(self.checkpoints)

    def begin(self, dtype: str, device: str, data: str, tokens: str) -> None:
        """Writes the run's options and digests for resuming it; a resumed run compares the digests instead.

        Args:
            dtype: the dtype of the base model.
            device: the device of the run.
            data: a digest of all examples.
            tokens: a digest of their tokens and labels.

        Raises:
            ValueError: the resumed run had other data, or its tokenizer or chat template made other tokens.
        """
        file = self.checkpoints / _OPTIONS
        if self.checkpoint is not None:
            before, name = read_yaml(file), shown(str(self.target))
            if before.get(_DATA) != data:
                raise ValueError(f"the data of the run in {name} was other: it cannot go on with this")
            if before.get(_TOKENS, tokens) != tokens:  # runs of earlier versions have no such digest
                raise ValueError(
                    f"the run in {name} had other tokens of the same data, so that the model's tokenizer or chat "
                    "template has changed: put it back as it was, or start another run"
                )
            return
        self.checkpoints.mkdir(exist_ok=True)
        options = self.options.to_dict() | {"dtype": dtype, "device": device, _DATA: data, _TOKENS: tokens}
        with atomic_file(file) as new:
            new.write_text(yaml.safe_dump(options, sort_keys=False), encoding="utf-8")


@contextmanager
def open_shared_run(options: TrainOptions) -> Iterator[RunFolder]:
    """Opens the run's folder for all processes: the first one claims and writes it (see open_run)."""
    with ExitStack() as stack:
        yield processes.by_first(lambda: stack.enter_context(open_run(options)))


@contextmanager
def open_run(options: TrainOptions) -> Iterator[RunFolder]:
    """Claims the output folder: a new or empty one, one to overwrite, or one of an interrupted run to resume.

    At the end, a run that saved its adapter is at its target; of any other run, only complete checkpoints stay.

    Raises:
        ValueError: the folder cannot be made, is not free, or another process has it; or there is no checkpoint to
            resume from, or the earlier run had other options.
    """
    with ExitStack() as stack:
        target = _free_name(stack) if options.output is None else _named_folder(options, stack)
        hidden = target.parent / f".{target.name}.new"
        stack.callback(remove, hidden, "(?!)")  # removes it at the end if it is empty
        if os.path.isdir(hidden):
            stack.enter_context(claimed(hidden))
            if not (hidden / _MARK).exists():  # killed after the exchange: the hidden folder holds the old run
                _discard(hidden, target)
            elif (hidden / _RESULTS).is_file():  # killed before the exchange
                _replace(hidden, target)
        (target / _MARK).unlink(missing_ok=True)
        folder = _resumed_run(options, target, hidden) if options.resume else _new_run(options, target, hidden, stack)
        try:
            yield folder
        finally:
            _close(folder)


def _free_name(stack: ExitStack) -> Path:
    """Claims the first folder align_lora_run[-N] that does not exist or holds only leftovers of a killed run."""
    for name in ("align_lora_run", *(f"align_lora_run-{n}" for n in range(2, 10_000))):
        path = Path(name)
        if os.path.lexists(path) and not (path / LOCK).is_file():
            continue
        with suppress(InUse), ExitStack() as attempt:
            attempt.enter_context(claimed(path))
            if _is_empty(path):
                stack.push(attempt.pop_all())
                return path
    raise ValueError("there are too many folders align_lora_run-N: name one with --output")


def _named_folder(options: TrainOptions, stack: ExitStack) -> Path:
    output = options.output or ""
    path = user_path(output, "--output")
    if not output.strip():
        raise ValueError(f"output={shown(output)} is empty: name a folder")
    if options.resume and not options.save_steps and not path.is_dir():
        raise ValueError(f"{shown(output)} holds no checkpoint to resume from: --save-steps writes them")
    stack.enter_context(claimed(path))
    return Path(os.path.realpath(path)) if path.is_symlink() or path.name in ("", "..") else path


def _new_run(options: TrainOptions, target: Path, hidden: Path, stack: ExitStack) -> RunFolder:
    """Returns the folder of a new run."""
    waiting = bool(checkpoints(hidden / _CHECKPOINTS))
    if _is_empty(target) and not waiting:
        remove(target, _files_of_run(target))
        return RunFolder(target, target, options)
    if not options.overwrite:
        cure = "--overwrite, or another --output"
        if waiting or (last_checkpoint(target / _CHECKPOINTS) and not (target / _RESULTS).is_file()):
            cure = "--resume to go on with its run, " + cure
        raise ValueError(f"the output folder {shown(str(options.output))} is not empty: use {cure}")
    for folder in (target, hidden):
        if other := first_foreign_file(folder, _files_of_run(folder)):
            raise ValueError(
                f"the output folder {shown(str(options.output))} holds {shown(other)}, which no run has written: "
                "--overwrite replaces nothing but runs; choose another --output"
            )
    if is_fixed(target):
        raise ValueError(f"the run in {shown(str(options.output))} cannot be replaced in one step (a mount point, the "
                         "current folder, or in one that is read-only): choose another --output")  # fmt: skip
    stack.enter_context(claimed(hidden))
    remove(hidden, _files_of_run(hidden))
    (hidden / _MARK).touch()
    return RunFolder(target, hidden, options)


def _resumed_run(options: TrainOptions, target: Path, hidden: Path) -> RunFolder:
    """Returns the folder of a resumed run; of one that begins, if it writes checkpoints and none is there yet."""
    if options.output is None:
        raise ValueError("--resume goes on with the run in a folder: name it with --output")
    path = hidden if last_checkpoint(hidden / _CHECKPOINTS) else target
    if (path / _RESULTS).is_file():
        raise ValueError(f"the run in {shown(options.output)} is complete: there is nothing to resume; "
                         f"--adapter-from {path / _ADAPTER} starts another run from its adapter")  # fmt: skip
    last = last_checkpoint(path / _CHECKPOINTS)
    if last is None:
        if options.save_steps and _is_empty(target) and _is_empty(hidden):
            remove(target, _files_of_run(target))
            return RunFolder(target, target, options)
        broken = [f"{c.name} is not whole: {damage(c)}" for c in checkpoints(path / _CHECKPOINTS)[-1:]]
        reason = broken[0] if broken else "--save-steps writes them"
        raise ValueError(f"{shown(options.output)} holds no checkpoint to resume from: {reason}")
    stored = read_yaml(path / _CHECKPOINTS / _OPTIONS)
    before = TrainOptions.from_mapping({name: value for name, value in stored.items() if name not in (_DATA, _TOKENS)})
    given = options.to_dict()
    for name, value in before.to_dict().items():
        automatic = name in _AUTOMATIC and given[name] == "auto"
        if name not in _CHANGEABLE and given.get(name) != value and not automatic:
            raise ValueError(
                f"the run in {shown(options.output)} had {name}={value!r}, not {shown(given.get(name))}: give the same "
                f"options to resume it, or start another run, with --adapter-from {path / _ADAPTER} if it has ended"
            )
    for name in _DIVIDING:
        if bool(getattr(before, name)) != bool(getattr(options, name)):
            began, cure = ("with", "give it") if getattr(before, name) else ("without", "leave it out")
            raise ValueError(f"the run in {shown(options.output)} began {began} --{name}, and nothing else loads its "
                             f"optimizer's state: {cure}, or start another run from its adapter")  # fmt: skip
    remove(path, _TEMP)
    return RunFolder(target, path, replace(options, dtype=before.dtype, device=before.device), last)


def _close(folder: RunFolder) -> None:
    """Leaves a finished run at its target, or else only complete checkpoints, or else none of our files."""
    clean(folder.checkpoints)
    if not folder.keep:
        if not checkpoints(folder.checkpoints):
            remove(folder.path, _files_of_run(folder.path))
        return
    if not folder.options.save_steps:
        remove(folder.checkpoints, _files_of_checkpoints(folder.checkpoints))
    if folder.path != folder.target:
        _replace(folder.path, folder.target)


def _replace(hidden: Path, target: Path) -> None:
    """Replaces a run by a complete one, and keeps the replaced folder's foreign files; both folders are claimed."""
    rename_into_place(hidden, target)
    exchange(hidden / LOCK, target / LOCK)
    (target / _MARK).unlink(missing_ok=True)
    _discard(hidden, target)


def _discard(hidden: Path, target: Path) -> None:
    """Removes a replaced run after moving its foreign files to the target."""
    ours = _files_of_run(hidden)
    move_foreign_files(hidden, target, ours)
    remove(hidden, ours)


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or only leftovers of a run without results."""
    used = (folder / _RESULTS).exists() or (folder / _ADAPTER / OUR_CONFIG).exists()
    return not (used or checkpoints(folder / _CHECKPOINTS) or first_foreign_file(folder, _files_of_run(folder)))


def _files_of_run(folder: Path) -> str:
    """Returns a regular expression for the paths of a run's files in its folder, including a killed run's."""
    run = rf"{_RESULTS}|report\.html|rows\.jsonl\.gz|losses\.png"  # a plot of older runs
    adapter = rf"{_ADAPTER}/({adapter_files(folder / _ADAPTER)})|\.{_ADAPTER}-[^/]*\.new/.*"
    run += rf"|tensorboard/.*|{re.escape(_MARK)}|{_TEMP}|{adapter}"
    return rf"{run}|{_CHECKPOINTS}/({_files_of_checkpoints(folder / _CHECKPOINTS)})"


def _files_of_checkpoints(folder: Path) -> str:
    known = (rf"{path.name}/({files_of(path) or '(?!)'})" for path in checkpoints(folder))
    return "|".join([rf"\.?{_OPTIONS}(-.*)?", rf"({re.escape(WRITING)}|{re.escape(OLD)})/.*", *known])
