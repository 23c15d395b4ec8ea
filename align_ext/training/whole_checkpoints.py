"""Atomic checkpoints: each gets its name when it is complete, and lists its files in whole.json.

A checkpoint is written below .writing in the same folder, synced to the disk, and renamed. So a folder checkpoint-N is
always complete; whole.json also shows whether a file was truncated or changed afterwards.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from align_ext.system.messages import shown
from align_ext.system.reading import MEBIBYTE, read_json
from align_ext.system.writing import first_foreign_file, move_foreign_files, rename_into_place, sync

MANIFEST, WRITING, OLD = "whole.json", ".writing", ".old"
_NAME = re.compile(r"checkpoint-(\d+)")
_DIGESTED = 1024 * MEBIBYTE  # larger files have only their size recorded


def write_manifest(folder: Path) -> None:
    """Writes the manifest of a folder's files, and syncs the folder to the disk."""
    names = sorted(os.path.relpath(path, folder) for path in folder.rglob("*") if path.is_file())
    content = {name: _fingerprint(folder / name) for name in names if name != MANIFEST}
    (folder / MANIFEST).write_text(json.dumps({"files": content}, indent=1) + "\n", encoding="utf-8")
    sync(folder)


def damage(checkpoint: Path) -> str | None:
    """Returns why a checkpoint is not complete, or None."""
    try:
        files = read_json(checkpoint / MANIFEST)["files"]
        for name, recorded in files.items():
            if _fingerprint(checkpoint / name) != recorded:
                return f"{name} is not as it was written"
    except (OSError, KeyError, ValueError, AttributeError):
        return f"{MANIFEST}, or a file that it names, is missing or cannot be read"
    return None


def files_of(checkpoint: Path) -> str:
    """Returns a regular expression for the files in a checkpoint's manifest, or "" without a manifest."""
    with suppress(ValueError, KeyError, AttributeError):
        return "|".join(map(re.escape, (*read_json(checkpoint / MANIFEST)["files"], MANIFEST)))
    return ""


def checkpoints(folder: Path) -> list[Path]:
    """Returns the checkpoints in a folder, complete or not, in the order of their steps."""
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in found if _NAME.fullmatch(path.name) and path.is_dir()), key=step_of)


def step_of(checkpoint: Path) -> int:
    """Returns the step of a checkpoint."""
    match = _NAME.fullmatch(checkpoint.name)
    return int(match[1]) if match else -1


def last_checkpoint(folder: Path) -> Path | None:
    """Returns the last complete checkpoint in a folder, or None."""
    return next((path for path in reversed(checkpoints(folder)) if damage(path) is None), None)


def check_whole(checkpoint: Path) -> None:
    """Refuses a checkpoint that does not match its manifest.

    Raises:
        ValueError: it is not complete; the message names the last complete one in its folder.
    """
    if (checkpoint / MANIFEST).exists() and (reason := damage(checkpoint)):
        last = last_checkpoint(checkpoint.parent)
        cure = f"go on from {shown(str(last))}" if last else "there is no whole one beside it"
        raise ValueError(f"the checkpoint {shown(str(checkpoint))} is not whole ({reason}): {cure}")


def publish(new: Path, target: Path) -> None:
    """Renames a complete checkpoint to its target, and keeps foreign files of a checkpoint that it replaces."""
    write_manifest(new)
    rename_into_place(new, target)
    if new.is_dir():
        move_foreign_files(new, target, files_of(new) or ".*")
        shutil.rmtree(new)


def keep_last(folder: Path, limit: int | None, also: Sequence[str | None] = ()) -> None:
    """Removes the oldest checkpoints beyond a number, but none of `also`, and none with files that are not ours."""
    found = sorted(checkpoints(folder), key=lambda path: path.stat().st_mtime)
    kept = {Path(name).name for name in also if name}
    spare = [path for path in found[:-1] if path.name not in kept and not first_foreign_file(path, files_of(path))]
    for path in spare[: max(0, len(found) - limit)] if limit and limit > 0 else ():
        os.rename(path, folder / OLD)  # in one step, so that a folder checkpoint-N is always complete
        shutil.rmtree(folder / OLD)


def clean(folder: Path) -> None:
    """Removes leftovers of processes that were killed while they wrote or removed a checkpoint."""
    for name in (WRITING, OLD):
        shutil.rmtree(folder / name, ignore_errors=True)


def _fingerprint(file: Path) -> list[int | str]:
    size = file.stat().st_size
    if size > _DIGESTED:
        return [size]
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(MEBIBYTE):
            digest.update(block)
    return [size, digest.hexdigest()]
