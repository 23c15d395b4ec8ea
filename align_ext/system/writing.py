"""What goes into files: whole or not at all, for one process at a time, and never at the cost of what is not ours.

A file or folder is written beside its place, under a hidden name, brought to the disk, and takes its place by one
rename. A folder is claimed by a lock on a file in it: the kernel drops it with the process, however that ends, so that
what a killed process left is told from what a living one works on. Over NFS such a lock holds between machines too;
where a file system has none (Lustre without flock), two processes do not see each other, and a warning says so.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import logging
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align_ext.system.reading import check_folder, exists, reason_of, shown

LOCK = ".align_lora.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_ENDS = 1 << 16  # bytes of a result in which its mark stands
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LOGGER = logging.getLogger(__name__)
_held: dict[int, os.stat_result] = {}  # the lock files of this process by descriptor


class InUse(ValueError):
    """Another process has claimed the folder."""


@contextmanager
def claimed(folder: Path, *, wait: bool = False) -> Iterator[Path]:
    """Claims a folder for this process; what had to be made of it, with its parents, and stays empty vanishes.

    Args:
        folder: the folder.
        wait: wait until no other process has it, instead of refusing.

    Raises:
        InUse: another process has it.
        ValueError: it cannot be made or written to.
    """
    made, lock = [], None
    try:
        while lock is None:  # whoever had it removes it
            made += make_folder(folder)
            left = (folder / LOCK).exists()
            lock = _lock(folder / LOCK, wait=wait)
        if left and lock in _held:
            made.append(folder)  # by a process that died
        yield folder
    finally:
        if lock in _held:
            if _is_at(_held.pop(lock), folder / LOCK):
                os.unlink(folder / LOCK)
            os.close(lock)
        _remove_empty(made)


def make_folder(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were not there, the outermost first.

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
    except (OSError, ValueError) as error:  # a name with a zero in it is a ValueError
        _remove_empty(made)
        raise ValueError(f"the folder {shown(str(folder))} cannot be made: {reason_of(error)}") from error
    return made


def _remove_empty(folders: list[Path]) -> None:
    for path in reversed(folders):
        with suppress(OSError):  # it is not empty
            path.rmdir()


def _lock(file: Path, *, wait: bool) -> int | None:
    """Locks a file; -1 where this process has locked it already, None where it vanished meanwhile."""
    if any(_is_at(held, file) for held in _held.values()):
        return -1
    try:
        lock = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"cannot write to the folder {shown(str(file.parent))}: {reason_of(error)}") from error
    found = os.fstat(lock)
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
    if _is_at(found, file):
        _held[lock] = found
        return lock
    os.close(lock)
    return None


def _is_at(found: os.stat_result, file: Path) -> bool:
    try:
        return os.path.samestat(found, os.stat(file))
    except OSError:
        return False


def _let_go() -> None:
    """In a forked process: closes its copies, which would keep the locks when the first process has died."""
    for lock in _held:
        os.close(lock)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


def exchange(one: Path, other: Path) -> None:
    """Swaps two folders or files: in one step, or where the file system has no such step (NFS) in three renames."""
    try:
        failed = _LIBC.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) != 0
        code = ctypes.get_errno() if failed else 0
    except AttributeError:  # a C library without it
        code = errno.ENOSYS
    if code in _NO_EXCHANGE:
        aside = one.with_name(f"{one.name}.aside")
        _all_or_none([(other, aside), (one, other), (aside, one)])
    elif code:
        raise OSError(code, os.strerror(code), str(other))


def _all_or_none(moves: list[tuple[Path, Path]]) -> None:
    """Renames each source to its place; where one fails, those before it are undone."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, place in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, place)
            done.append((source, place))
    except BaseException:
        for source, place in reversed(done):
            os.rename(place, source)
        raise


def sync(path: Path) -> None:
    """Brings a file, or a folder with all that is in it, to the disk."""
    _sync_one(path)
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            _sync_one(Path(folder, name))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system has no such thing for a folder
            raise
    finally:
        os.close(descriptor)


def foreign(folder: Path, ours: str) -> str | None:
    """The first thing in a folder that is not ours, or None.

    Args:
        folder: the folder.
        ours: a regular expression of our files' paths in it; folders that hold nothing else are ours, links never.
    """
    return next((name for name in _files(folder) if not _is_ours(folder, name, ours)), None)


def remove(folder: Path, ours: str) -> None:
    """Removes our files (as for `foreign`) but the folder's claim, and what is empty then, the folder itself too."""
    for name in list(_files(folder)):
        if name != LOCK and _is_ours(folder, name, ours):
            os.unlink(folder / name)
    for path, _, _ in os.walk(folder, topdown=False):
        _remove_empty([Path(path)])


def give_back(old: Path, target: Path, ours: str) -> None:
    """Moves what is not ours out of a folder that was replaced into the one that replaced it."""
    while (name := foreign(old, ours)) is not None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(old / name, target / name)


def _is_ours(folder: Path, name: str, ours: str) -> bool:
    known = Path(name).name == LOCK or re.fullmatch(ours, name, re.DOTALL) is not None
    return known and not (folder / name).is_symlink()


def _files(folder: Path) -> Iterator[str]:
    """The paths of all files and links in a folder, relative to it."""
    for path, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        for name in sorted((*names, *links)):
            yield os.path.relpath(os.path.join(path, name), folder)


@contextmanager
def _beside(target: Path, parent: Path) -> Iterator[Path]:
    """A hidden folder of this process alone, which vanishes at the end, as do those that dead processes left there."""
    short = target.name[:60]
    try:
        for left in map(Path, glob.glob(f"{glob.escape(str(parent))}/.{glob.escape(short)}-*.new")):
            with suppress(InUse), claimed(left):
                shutil.rmtree(left, ignore_errors=True)
        path = Path(tempfile.mkdtemp(prefix=f".{short}-", suffix=".new", dir=parent))
    except OSError as error:
        raise ValueError(f"cannot write to the folder {shown(str(parent))}: {reason_of(error)}") from error
    with claimed(path, wait=True):  # another process may just look whether it was left behind
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], ours: str = "") -> Iterator[Path]:
    """A new folder that takes the target's place when the block ends well, and vanishes otherwise.

    Where the target exists, our files in it are replaced and others stay. It happens in one step where the target holds
    nothing else and can be renamed (it is no mount point and not where the process is), else file by file, all or none.

    Args:
        folder: the target.
        ours: as for `foreign`.

    Raises:
        ValueError: the folder cannot be made.
    """
    check_folder(folder)
    target = Path(os.path.realpath(folder))
    if exists(target) and not target.is_dir():
        raise ValueError(f"{shown(os.fspath(folder))} is a file, not a folder")
    fixed, made = target.exists() and is_fixed(target), make_folder(target.parent)
    try:
        with _beside(target, target if fixed else target.parent) as work:
            new = work / "new"
            new.mkdir()
            yield new
            sync(new)
            if fixed or (target.exists() and foreign(target, ours) is not None):
                _move_in(new, target, ours, work / "old")
            else:
                take_place(new, target)
                if new.is_dir():
                    give_back(new, target, ours)  # what came in between
    finally:
        _remove_empty(made)


def take_place(new: Path, target: Path) -> None:
    """Gives a complete folder its name; what had the name before is at `new` then, if it was not empty."""
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        exchange(new, target)
    _sync_one(target.parent)


def is_fixed(folder: Path) -> bool:
    """Whether a folder that exists cannot be replaced by another: it is a mount point, in use as ".", or held so."""
    within = Path.cwd().is_relative_to(folder)
    return within or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)


def _move_in(new: Path, target: Path, ours: str, old: Path) -> None:
    """Moves our files of target into old, and those of new into target; or nothing."""
    with claimed(target, wait=True):
        known = [name for name in _files(target) if name != LOCK and _is_ours(target, name, ours)]
        moves = [(target / name, old / name) for name in known if not name.startswith(new.parent.name)]
        _all_or_none([*moves, *((new / name, target / name) for name in _files(new))])
        _remove_empty(sorted({(target / name).parent for name in known} - {target}))


@contextmanager
def atomic_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Where to write a file that takes the target's place when the block ends well, and vanishes otherwise."""
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():  # a device, a pipe
        yield target
        return
    new = target.with_name(f".{target.name[:60]}-{secrets.token_hex(4)}{target.suffix[:10]}")
    try:
        yield new
        sync(new)
        os.replace(new, target)
    finally:
        new.unlink(missing_ok=True)


def check_file(option: str, file: str | os.PathLike[str], mark: str) -> None:
    """Checks that a result can be written to a file: a new one, an empty one, a device, or an earlier result.

    Args:
        option: that names the file, for messages.
        file: the file.
        mark: what every such result holds near its start or its end, and nothing else does.

    Raises:
        ValueError: it cannot, or another file would be lost.
    """
    try:
        if Path(file).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if Path(file).exists():
            os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
        if Path(file).is_file() and not _is_result(Path(file), mark):
            raise FileExistsError(errno.EEXIST, "the file there is no such result, and would be lost: name another")
        with suppress(InterruptedError), atomic_file(file) as new:
            if new.name == Path(os.path.realpath(file)).name:
                return
            new.touch(exist_ok=False)
            raise InterruptedError
    except (OSError, ValueError) as error:
        raise ValueError(f"{option}={shown(os.fspath(file))} cannot be written: {reason_of(error)}") from error


def _is_result(file: Path, mark: str) -> bool:
    with open(file, "rb") as content:
        size, found = os.fstat(content.fileno()).st_size, content.read(_ENDS)
        content.seek(max(size - _ENDS, 0))
        return size == 0 or mark.encode() in found + content.read(_ENDS)


def user_path(path: str, what: str) -> Path:
    """A path as a user gives it, ~ being a home; ValueError, which names the option, where there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what} {shown(path)}: {reason_of(error)}") from error


def check_space(folder: Path, size: int) -> None:
    """Checks that so many bytes fit onto a folder's disk.

    Raises:
        ValueError: they do not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"the disk of {shown(str(folder))} has {free / 1e6:.1f} MB left, of {size / 1e6:.1f} MB that will be "
            "written: make room, or choose another output"
        )
