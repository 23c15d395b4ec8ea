"""What comes out of files, checked once for all readers: text, JSON, YAML, names and patterns, all of bounded size.

Whatever a file holds, the answer is its content or a ValueError of one line that names the file. Nothing here blocks
(a FIFO is refused), recurses without end, or takes memory beyond its limits.
"""

from __future__ import annotations

import functools
import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import regex
import yaml

MEBIBYTE = 1 << 20
MOST_BYTES = 16 * MEBIBYTE  # of a configuration, or of one row of data
_MOST_DEPTH = 64  # of brackets in a file
_MOST_PATTERN = 1000  # letters of a regular expression
_MOST_NAME = 200  # bytes of a name
_SECONDS = 1.0  # that a pattern may take for one name
_INT64 = 2**63


def shown(value: Any, most: int = 80) -> str:
    """A value in a message: its repr in one line, cut in the middle."""
    try:
        text = value if isinstance(value, str) and len(value) > 10 * most else repr(value)
    except (RecursionError, ValueError):  # nested, or an integer of thousands of digits
        return f"<{type(value).__name__}>"
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-most // 3 :]}"


def why(error: BaseException) -> str:
    """The reason an exception gives, in a line that ends: an OSError's own words, else its first ones."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + " ..."


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens an ordinary file to read its bytes, through gzip where its name ends in .gz.

    Raises:
        ValueError: there is none, it may not be read, or it is a folder, a device or a FIFO.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # so that a FIFO does not wait
    except (OSError, ValueError) as error:  # a name with a zero in it is a ValueError
        raise ValueError(f"cannot read {shown(os.fspath(path))}: {why(error)}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"cannot read {shown(os.fspath(path))}: it is no ordinary file")
    file = os.fdopen(descriptor, "rb")
    return gzip.GzipFile(fileobj=file, mode="rb") if os.fspath(path).endswith(".gz") else file  # type: ignore[return-value]


def read_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """Reads a file of UTF-8 text of at most so many bytes.

    Raises:
        ValueError: it cannot be read, is larger, or is no such text.
    """
    try:
        with open_file(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:  # a disk that fails, a damaged .gz
        raise ValueError(f"cannot read {shown(os.fspath(path))}: {why(error)}") from error
    if len(content) > most:
        raise ValueError(f"cannot read {shown(os.fspath(path))}: it is larger than {most} bytes")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"cannot read {shown(os.fspath(path))}: {why(error)}") from error


def read_lines(path: str | os.PathLike[str], most: int = MOST_BYTES) -> Iterator[tuple[int, str]]:
    """Reads the lines of a file (.gz or not) one by one, each with its number from 1 on.

    Raises:
        ValueError: it cannot be read, a line is larger than `most` bytes, or is no UTF-8 text.
    """
    name, number = shown(Path(path).name), 0
    try:
        with open_file(path) as file:
            while line := file.readline(most + 1):
                number += 1
                if len(line) > most:
                    raise ValueError(f"it is larger than {most} bytes")
                yield number, line.decode("utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ValueError) and not number and str(error).startswith("cannot read"):
            raise
        raise ValueError(f"{name}, line {max(number, 1)}: cannot be read ({why(error)})") from error


def parse_json(text: str) -> Any:
    """Reads a JSON text: strictly what the standard allows, each key once, no number beyond int64 or float64.

    Raises:
        ValueError: it is none; the message does not name the file.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_no_number, parse_float=_finite, parse_int=_short
        )
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error
    _check_values(value)
    return value


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file that holds one JSON object.

    Raises:
        ValueError: it cannot be read, or it holds none.
    """
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{os.fspath(path)} is damaged: {why(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{os.fspath(path)} is damaged: it holds no JSON object")
    return content


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of `name: value` lines, without aliases; an empty one is empty.

    Raises:
        ValueError: it cannot be read, or it holds something else.
    """
    text = read_text(path, MEBIBYTE)
    try:
        content = _PlainLoader(text).get_single_data()
        _check_values(content)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown(os.fspath(path))} is not YAML: {why(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{shown(os.fspath(path))} must hold `option: value` lines")
    return content


def check_pattern(pattern: str) -> None:
    """Checks a regular expression.

    Raises:
        ValueError: it is none, or longer than 1,000 letters.
    """
    if len(pattern) > _MOST_PATTERN:
        raise ValueError(f"the pattern {shown(pattern)} is longer than {_MOST_PATTERN} letters")
    try:
        _compiled(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{shown(pattern)} is no regular expression: {why(error)}") from error


def matches(pattern: str, name: str) -> bool:
    """Whether a regular expression fits a whole name.

    Raises:
        ValueError: it is none, or takes longer than a second.
    """
    check_pattern(pattern)
    try:
        return _compiled(pattern).fullmatch(name, timeout=_SECONDS) is not None
    except TimeoutError as error:
        raise ValueError(
            f"the pattern {shown(pattern)} takes more than {_SECONDS:g} s for {shown(name)}: write one without nested "
            "repetitions, or list the names"
        ) from error
    except MemoryError as error:
        raise ValueError(f"the pattern {shown(pattern)} takes too much memory for {shown(name)}") from error


def check_names(names: Any, what: str, *, most: int = 10_000, for_folders: bool = False) -> tuple[str, ...]:
    """Checks names out of a file: a list of different, printable strings of 1 to 200 bytes.

    Args:
        names: what the file holds.
        what: opens the message of an error.
        most: how many there may be.
        for_folders: each is to name a folder as well: no slash, no "." or "..".

    Returns:
        The names.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(names, (list, tuple)) or len(names) > most:
        raise ValueError(f"{what}={shown(names)} must be a list of at most {most} names")
    for name in names:
        if reason := _unfit_name(name, for_folders=for_folders):
            raise ValueError(f"{what}: {shown(name)} is no name{' for a folder' * for_folders}: {reason}")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"{what}: {shown(twice)} is there twice")
    return tuple(names)


def _unfit_name(name: Any, *, for_folders: bool) -> str | None:
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}, not text"
    size = len(name.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= _MOST_NAME or name != name.strip():
        return f"a name has 1 to {_MOST_NAME} bytes and no space at its ends"
    if not name.isprintable():
        return "a name is printable"
    if for_folders and (name in (".", "..") or "/" in name or "\\" in name):
        return "a folder's name is not . or .. and holds no slash"
    return None


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain data; no aliases, since a few of them name billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases (*name): write the values out")
        return super().compose_node(parent, index)


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(pattern)


def _check_values(value: Any) -> None:
    """Checks how deep brackets are nested, and that integers fit into 64 bits."""
    level: list[Any] = [value]
    for _ in range(_MOST_DEPTH):
        for number in level:
            if isinstance(number, int) and not -_INT64 <= number < _INT64:
                raise ValueError(f"the number {shown(number)} is out of range")
        level = [item for items in level for item in _items(items)]
        if not level:
            return
    raise ValueError(f"its brackets are nested more than {_MOST_DEPTH} deep")


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in (k for k, _ in pairs[:i]))
        raise ValueError(f"the key {shown(twice)} is there twice")
    return result


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _finite(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {shown(text)} is out of range")
    return value


def _short(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"the number {shown(text)} is out of range")
    return int(text)
