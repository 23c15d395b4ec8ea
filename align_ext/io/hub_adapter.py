"""Finds an adapter's folder: on this machine, or on the hub, from which only its tensors and options are downloaded."""

import os
import re
from pathlib import Path

from align_ext.system.messages import reason_of, shown
from align_ext.system.reading import check_folder, exists

_HUB_ID = r"[\w-][\w.-]*/[\w.-]+"


def local_folder(folder: str | os.PathLike[str], files: list[str], revision: str | None = None) -> Path:
    """Returns a folder as it is, or that of a repository of the hub, "owner/name", in the hub's cache.

    Args:
        folder: a folder, or a hub id; what is a folder here is never asked of the hub.
        files: patterns of the files that are downloaded.
        revision: a branch, tag or commit of the repository; None: its main branch.

    Raises:
        ValueError: a revision of a folder, or the hub does not give the repository and it is not in the cache.
    """
    check_folder(folder)
    path, name = Path(folder), os.fspath(folder)
    if exists(path) or exists(path.parent) or not re.fullmatch(_HUB_ID, name):
        if revision is not None:
            raise ValueError(f"revision={shown(revision)} goes with a hub id (owner/name), not with {shown(name)}")
        return path
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError

        from align_ext.base_model.hub import ask_hub
    except ModuleNotFoundError as error:
        raise ValueError(
            f"there is no folder {shown(name)}, and the hub needs {error.name}: pip install {error.name}"
        ) from error
    refusal = ask_hub(name, files[0], revision=revision)
    offline = refusal is not None and not isinstance(refusal, EntryNotFoundError)  # a repository without that file
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=offline))
    except Exception as error:  # without a connection the library raises anything
        reason = reason_of(refusal if offline and refusal is not None else error)
        raise ValueError(
            f"there is no adapter folder {shown(name)}, and the hub does not give it{_at(revision)}: {reason}; name a "
            f"folder, or fetch it where the hub can be reached and you may read it (hf download {name})"
        ) from error


def _at(revision: str | None) -> str:
    return "" if revision is None else f" at revision={shown(revision)}"
