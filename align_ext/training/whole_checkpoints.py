"""Whole checkpoints: each says in whole.json what its files are, and has its name only from when it is complete.

A checkpoint is written below .writing beside its place, brought to the disk, and renamed. Whatever ends the process,
what is called checkpoint-N has been written to the end; whole.json tells also what was cut or changed afterwards.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from align_ext.system.reading import MEBIBYTE, read_json, shown
from align_ext.system.writing import foreign, give_back, sync, take_place

MANIFEST, WRITING, OLD = "whole.json", ".writing", ".old"
_NAME = re.compile(r"checkpoint-(\d+)")
_DIGESTED = 1024 * MEBIBYTE  # larger files are known by their size alone


def seal(folder: Path) -> None:
    """Writes what a folder's files are, and brings all of it to the disk."""
    names = sorted(os.path.relpath(path, folder) for path in folder.rglob("*") if path.is_file())
    content = {name: _print_of(folder / name) for name in names if name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"files": content}, indent=1) + "\n", encoding="utf-8")
    sync(folder)


def damage(checkpoint: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        for name, wanted in files.items():
            if _print_of(checkpoint / name) != wanted:
                return f"{name} is not as it was written"
    except (OSError, KeyError, ValueError, AttributeError):
        return f"{MANIFEST}, or a file that it names, is missing or cannot be read"
    return None


def files_of(checkpoint: Path) -> str:
    """A regular expression of the files that a checkpoint was made of; of none where it does not say."""
    with suppress(ValueError, KeyError, AttributeError):
        return "|".join(map(re.escape, (*read_json(checkpoint / MANIFEST)["files"], MANIFEST)))
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, by their steps."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def last_checkpoint(folder: Path) -> Path | None:
    """The latest whole checkpoint in a folder of them, if there is one."""
    return next((path for path in reversed(checkpoints(folder)) if damage(path) is None), None)


def check_whole(checkpoint: Path) -> None:
    """Refuses a checkpoint that says what it holds and does not.

    Raises:
        ValueError: it is not whole; the message names the last one beside it that is.
    """
    if (checkpoint / MANIFEST).exists() and (reason := damage(checkpoint)):
        last = last_checkpoint(checkpoint.parent)
        cure = f"go on from {shown(str(last))}" if last else "there is no whole one beside it"
        raise ValueError(f"the checkpoint {shown(str(checkpoint))} is not whole ({reason}): {cure}")


def publish(new: Path, target: Path) -> None:
    """Gives a checkpoint that was written its name; another of that name goes, but for what was put into it."""
    seal(new)
    take_place(new, target)
    if new.is_dir():
        give_back(new, target, files_of(new) or ".*")
        shutil.rmtree(new)


def keep_last(folder: Path, most: int | None, also: Sequence[str | None] = ()) -> None:
    """Removes the oldest checkpoints but so many; never those named, nor what holds files that are not ours."""
    found = sorted(checkpoints(folder), key=lambda path: path.stat().st_mtime)
    kept = {Path(name).name for name in also if name}
    spare = [path for path in found[:-1] if path.name not in kept and foreign(path, files_of(path)) is None]
    for path in spare[: max(0, len(found) - most)] if most and most > 0 else ():
        os.rename(path, folder / OLD)  # in one step, so that what has the name is whole
        shutil.rmtree(folder / OLD)


def clear(folder: Path) -> None:
    """Removes what processes that died in the middle of writing or removing a checkpoint left."""
    for name in (WRITING, OLD):
        shutil.rmtree(folder / name, ignore_errors=True)


def _print_of(file: Path) -> list[int | str]:
    size = file.stat().st_size
    if size > _DIGESTED:
        return [size]
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(MEBIBYTE):
            digest.update(block)
    return [size, digest.hexdigest()]
