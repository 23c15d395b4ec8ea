"""Folders that one process at a time works in."""

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align_ext.system.reading import reason_of, shown

LOCK = ".align_lora.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_LOGGER = logging.getLogger(__name__)
_locks: dict[int, os.stat_result] = {}  # the lock files of this process by descriptor


class InUse(ValueError):
    """Raised if another process has claimed the folder."""


@contextmanager
def claimed(folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """Claims a folder for this process; folders that had to be made for it are removed again if they stay empty.

    Args:
        folder: the folder.
        wait: wait until no other process has it, instead of raising.

    Raises:
        InUse: another process has it.
        ValueError: it cannot be made or written to.
    """
    made, lock = [], None
    try:
        while lock is None:  # another process removed the lock file meanwhile
            made += make_folder(folder)
            leftover = (folder / LOCK).exists()
            lock = _lock(folder / LOCK, wait=wait)
        if leftover and lock in _locks:
            made.append(folder)  # a process that was killed had made it
        yield folder
    finally:
        if lock in _locks:
            if _is_same_file(_locks.pop(lock), folder / LOCK):
                os.unlink(folder / LOCK)
            os.close(lock)
        _remove_empty(made)


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that did not exist, the outermost first.

    Raises:
        ValueError: it cannot be made.
    """
    made: list[Path] = []
    try:
        for path in (*reversed(folder.parents), folder):
            if path.is_dir():
                continue
            try:
                path.mkdir()
            except FileExistsError:
                if path.is_dir():
                    continue
                raise ValueError("it is a link to nothing" if not path.exists() else f"{path.name} is a file") from None
            made.append(path)
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        _remove_empty(made)
        raise ValueError(f"the folder {shown(str(folder))} cannot be made: {reason_of(error)}") from error
    return made


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        with suppress(OSError):  # the folder is not empty
            path.rmdir()


def _lock(file: Path, *, wait: bool) -> int | None:
    """Locks a file; returns -1 if this process has locked it already, None if the file was removed meanwhile."""
    if any(_is_same_file(lock_status, file) for lock_status in _locks.values()):
        return -1
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot write to the folder {shown(str(file.parent))}: {reason_of(error)}") from error
    status = os.fstat(lock)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError as error:
        os.close(lock)
        raise InUse(f"another process is writing to {shown(str(file.parent))}") from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            os.close(lock)
            raise
        _LOGGER.warning("no file locks in %s: another process at the same time would not be noticed", file.parent)
    except BaseException:
        os.close(lock)
        raise
    if _is_same_file(status, file):
        _locks[lock] = status
        return lock
    os.close(lock)
    return None


def _is_same_file(status: os.stat_result, file: Path) -> bool:
    try:
        return os.path.samestat(status, os.stat(file))
    except OSError:
        return False


def _close_inherited_locks() -> None:
    """Closes a forked process's copies of the locks, which would outlive the process that holds them."""
    for lock in _locks:
        os.close(lock)
    _locks.clear()


os.register_at_fork(after_in_child=_close_inherited_locks)
