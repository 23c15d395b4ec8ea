"""Writes files and folders atomically, for one process at a time, and never removes files of others.

A file or folder is written next to its target under a hidden name, synced to the disk, and renamed to the target. A
process claims a folder by a lock on a file in it. The kernel releases the lock when the process ends, so leftovers of a
killed process can be told from the work of a living one. On NFS such a lock also works between machines; on a file
system without locks (Lustre without flock), two processes do not see each other, and a warning says so.
"""

import ctypes
import errno
import glob
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from align_ext.system.locks import LOCK, InUse, _remove_empty, claimed, make_folder
from align_ext.system.messages import reason_of, shown, shown_path
from align_ext.system.reading import check_folder, exists

_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
_MARK_RANGE = 1 << 16  # how many bytes at the start and the end of a result are searched for its mark
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # constants of renameat2
_LIBC = ctypes.CDLL(None, use_errno=True)


def exchange(one: Path, other: Path) -> None:
    """Swaps two folders or files: atomically, or by three renames if the file system cannot (NFS)."""
    try:
        failed = _LIBC.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) != 0
        code = ctypes.get_errno() if failed else 0
    except AttributeError:  # a C library without it
        code = errno.ENOSYS
    if code in _NO_EXCHANGE:
        spare = one.with_name(f"{one.name}.aside")
        _rename_all([(other, spare), (one, other), (spare, one)])
    elif code:
        raise OSError(code, os.strerror(code), str(other))


def _rename_all(moves: list[tuple[Path, Path]]) -> None:
    """Renames each source to its target; if one fails, the earlier ones are undone."""
    done: list[tuple[Path, Path]] = []
    try:
        for source, target_path in moves:
            target_path.parent.mkdir(parents=True, exist_ok=True)
            os.rename(source, target_path)
            done.append((source, target_path))
    except BaseException:
        for source, target_path in reversed(done):
            os.rename(target_path, source)
        raise


def sync(path: Path) -> None:
    """Syncs a file, or a folder and everything in it, to the disk."""
    _sync_one(path)
    for folder, folders, names in os.walk(path):
        for name in (*folders, *names):
            _sync_one(Path(folder, name))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system cannot sync folders
            raise
    finally:
        os.close(descriptor)


def first_foreign_file(folder: Path, ours: str) -> str | None:
    """Returns the first file in a folder that is not ours, or None.

    Args:
        folder: the folder.
        ours: a regular expression for the paths of our files in it; links are never ours.
    """
    return next((name for name in _files(folder) if not _is_ours(folder, name, ours)), None)


def remove(folder: Path, ours: str) -> None:
    """Removes our files (see first_foreign_file) except the lock, then all empty folders, also the folder itself."""
    for name in list(_files(folder)):
        if name != LOCK and _is_ours(folder, name, ours):
            os.unlink(folder / name)
    for path, _, _ in os.walk(folder, topdown=False):
        _remove_empty([Path(path)])


def move_foreign_files(old: Path, target: Path, ours: str) -> None:
    """Moves files that are not ours from a replaced folder into the folder that replaced it."""
    while (name := first_foreign_file(old, ours)) is not None:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(old / name, target / name)


def _is_ours(folder: Path, name: str, ours: str) -> bool:
    known = Path(name).name == LOCK or re.fullmatch(ours, name, re.DOTALL) is not None
    return known and not (folder / name).is_symlink()


def _files(folder: Path) -> Iterator[str]:
    """Yields the paths of all files and links in a folder, relative to it."""
    for path, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(path, name))]
        for name in sorted((*names, *links)):
            yield os.path.relpath(os.path.join(path, name), folder)


def remove_leftovers(target: Path, parent: Path | None = None) -> None:
    """Removes what processes that were killed in atomic_folder left: a folder of work, even if the target is whole.

    Args:
        target: the target.
        parent: the folder in which they worked; None: that of the target.
    """
    pattern = f".{glob.escape(_short(target))}-*.new"
    for leftover in map(Path, glob.glob(f"{glob.escape(str(parent or target.parent))}/{pattern}")):
        with suppress(InUse), claimed(leftover):
            shutil.rmtree(leftover, ignore_errors=True)


def _short(target: Path) -> str:
    return target.name[:60]


@contextmanager
def _work_folder(target: Path, parent: Path) -> Iterator[Path]:
    """Makes a hidden folder for this process and removes it at the end; also removes those of ended processes."""
    try:
        remove_leftovers(target, parent)
        path = Path(tempfile.mkdtemp(prefix=f".{_short(target)}-", suffix=".new", dir=parent))
    except OSError as error:
        raise ValueError(f"cannot write to the folder {shown(str(parent))}: {reason_of(error)}") from error
    with claimed(path, wait=True):  # another process may be checking whether it is a leftover
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], ours: str = "") -> Iterator[Path]:
    """Yields a new folder that replaces the target if the block succeeds, and is removed otherwise.

    If the target exists, our files in it are replaced and others stay: in one step if the target holds only our files
    and can be renamed (no mount point, not the working directory), else file by file, all or none.

    Args:
        folder: the target.
        ours: as in first_foreign_file.

    Raises:
        ValueError: the folder cannot be made.
    """
    check_folder(folder)
    target = Path(os.path.realpath(folder))
    if exists(target) and not target.is_dir():
        raise ValueError(f"{shown(os.fspath(folder))} is a file, not a folder")
    fixed, made = target.exists() and is_fixed(target), make_folder(target.parent)
    try:
        with _work_folder(target, target if fixed else target.parent) as work_folder:
            new = work_folder / "new"
            new.mkdir()
            yield new
            sync(new)
            if fixed or (target.exists() and first_foreign_file(target, ours) is not None):
                _replace_files(new, target, ours, work_folder / "old")
            else:
                rename_into_place(new, target)
                if new.is_dir():
                    move_foreign_files(new, target, ours)  # files that others wrote meanwhile
    finally:
        _remove_empty(made)


def rename_into_place(new: Path, target: Path) -> None:
    """Renames a complete folder to its target; a target that was not empty is at `new` afterwards."""
    try:
        os.rename(new, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        exchange(new, target)
    _sync_one(target.parent)


def is_fixed(folder: Path) -> bool:
    """Whether a folder cannot be renamed: a mount point, above the working directory, or in a read-only folder."""
    in_use = Path.cwd().is_relative_to(folder)
    return in_use or os.path.ismount(folder) or not os.access(folder.parent, os.W_OK)


def _replace_files(new: Path, target: Path, ours: str, old: Path) -> None:
    """Moves our files of target into old, and those of new into target; moves nothing if one move fails."""
    with claimed(target, wait=True):
        known = [name for name in _files(target) if name != LOCK and _is_ours(target, name, ours)]
        moves = [(target / name, old / name) for name in known if not name.startswith(new.parent.name)]
        _rename_all([*moves, *((new / name, target / name) for name in _files(new))])
        _remove_empty(sorted({(target / name).parent for name in known} - {target}))


def check_writable(folder: Path, cure: str) -> None:
    """Makes a folder, and checks that files can be written into it; cure: what else the user can do.

    Raises:
        ValueError: they cannot.
    """
    try:
        make_folder(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to the folder {shown_path(folder)} ({reason_of(error)}): {cure}") from error
    except ValueError as error:
        raise ValueError(f"{error}: {cure}") from error


@contextmanager
def atomic_file(file: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields the path of a new file that replaces the target if the block succeeds, and is removed otherwise.

    Raises:
        ValueError: the file cannot be written.
    """
    target = Path(os.path.realpath(file))
    if target.exists() and not target.is_file():  # a device or a pipe
        yield target
        return
    new = target.with_name(f".{target.name[:60]}-{secrets.token_hex(4)}{target.suffix[:10]}")
    try:
        yield new
        sync(new)
        os.replace(new, target)
    except OSError as error:
        if error.filename not in (None, str(new)):  # the block failed at another file
            raise
        raise ValueError(f"cannot write {shown_path(target)}: {reason_of(error)}") from error
    finally:
        with suppress(OSError):
            new.unlink(missing_ok=True)


class _Tried(Exception):
    """Ends an attempt to write before anything is replaced."""


def check_file(option: str, file: str | os.PathLike[str], mark: str) -> None:
    """Checks that a result can be written to a file: a new one, an empty one, a device, or an earlier result.

    Args:
        option: the option that names the file, for messages.
        file: the file.
        mark: a text that every such result, and no other file, holds near its start or its end.

    Raises:
        ValueError: it cannot be written, or another file would be lost.
    """
    try:
        if Path(file).is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a folder")
        if Path(file).exists():
            os.close(os.open(file, os.O_WRONLY | os.O_NONBLOCK))
        if Path(file).is_file() and not _is_result(Path(file), mark):
            raise FileExistsError(errno.EEXIST, "the file there is no such result, and would be lost: name another")
        with suppress(_Tried), atomic_file(file) as new:
            if new.name == Path(os.path.realpath(file)).name:
                return
            new.touch(exist_ok=False)
            raise _Tried
    except (OSError, ValueError) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # of atomic_file's error
        raise ValueError(f"{option}={shown(os.fspath(file))} cannot be written: {reason_of(cause)}") from error


def _is_result(file: Path, mark: str) -> bool:
    with open(file, "rb") as content:
        size, start = os.fstat(content.fileno()).st_size, content.read(_MARK_RANGE)
        content.seek(max(size - _MARK_RANGE, 0))
        return size == 0 or mark.encode() in start + content.read(_MARK_RANGE)


def user_path(path: str, what: str) -> Path:
    """Expands ~ in a path from the user; raises ValueError, which names the option, if there is no such home."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what} {shown(path)}: {reason_of(error)}") from error


def check_space(folder: Path, size: int) -> None:
    """Checks that the disk of a folder has so many bytes left.

    Raises:
        ValueError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(
            f"the disk of {shown(str(folder))} has {free / 1e6:.1f} MB left, of {size / 1e6:.1f} MB that will be "
            "written: make room, or choose another output"
        )
