"""What comes out of files, checked once for all readers: text, JSON, YAML, names and patterns, all of bounded size.

Whatever a file holds, the answer is its content or a ValueError of one line that names the file. Nothing here blocks
(a FIFO is refused), recurses without end, or takes memory beyond its limits.
"""

from __future__ import annotations

import functools
import gzip
import json
import math
import os
import re
import reprlib
import stat
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import regex
import yaml

MEBIBYTE = 1 << 20
MOST_BYTES = 16 * MEBIBYTE  # of one row of data
_MOST_JSON = 4 * MEBIBYTE  # of a configuration
_MOST_YAML = MEBIBYTE // 16  # the reader of YAML takes seconds for a megabyte
_MOST_RATIO = 100  # of what a .gz file of lines unpacks to, beyond
_UNPACKED = 256 * MEBIBYTE
_MOST_DEPTH = 64  # of brackets in a file
_MOST_PATTERN = 2000  # letters of a regular expression
_MOST_COUNT = 1000  # product of the counts {n} in it: it is written out so often when it is compiled
_MOST_NAME, _MOST_FOLDER = 1000, 200  # bytes of a name, and of one that is to name a folder
_SECONDS = 0.5  # that a file's patterns may take
_INT64 = 2**63
_SAME_AS_RE = "([:=!#)aimsux-]|<[=!]|P[<=>])"  # after "(?": what means to the module regex what it means to re


def shown(value: Any, most: int = 80) -> str:
    """A value in a message: its repr in one line of printable letters, cut in the middle."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = short.maxfrozenset = 12
    try:
        return line(short.repr(value), most)
    except ValueError:  # an integer of thousands of digits
        return f"<{type(value).__name__}>"


def shown_path(path: str | os.PathLike[str]) -> str:
    """A path in a message, whole where it can be."""
    return line(os.fspath(path), 300)


def reason_of(error: BaseException) -> str:
    """The reason an exception gives, in a line that ends: an OSError's own words, else its first ones."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return line(text, 300)


def line(text: str, most: int) -> str:
    """Text as one line of at most so many letters, cut in the middle; what cannot be printed is escaped."""
    text = text if len(text) <= 4 * most else f"{text[: 2 * most]} {text[-2 * most :]}"
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= most else f"{text[: most // 2]} ... {text[-(most // 2 - 5) :]}"


def check_folder(folder: Any, what: str = "folder") -> None:
    """Raises ValueError for what names no folder."""
    if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str):
        raise ValueError(f"{what}={shown(folder)} must be a folder's path, text or a Path")
    if not os.fspath(folder).strip():
        raise ValueError(f"{what}={shown(folder)} is empty: name a folder")


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is something of this name.

    Raises:
        ValueError: nobody can tell, since a folder above it may not be searched.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error
    return True


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens an ordinary file to read its bytes, through gzip where its name ends in .gz.

    Raises:
        ValueError: there is none, it may not be read, or it is a folder, a device or a FIFO.
    """
    try:
        kind = os.stat(path).st_mode  # before it is opened: to open a device may do something
        if not stat.S_ISREG(kind):
            raise ValueError(f"it is {'a folder' if stat.S_ISDIR(kind) else 'no ordinary file'}")
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:  # a name with a zero in it is a ValueError
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error
    if not os.fspath(path).lower().endswith(".gz"):
        return file
    unzipped = gzip.GzipFile(fileobj=file, mode="rb")
    unzipped.myfileobj = file  # type: ignore[assignment]  # which it closes with itself
    return unzipped  # type: ignore[return-value]


def read_text(path: str | os.PathLike[str], most: int = MOST_BYTES) -> str:
    """Reads a file of UTF-8 text of at most so many bytes.

    Raises:
        ValueError: it cannot be read, is larger, or is no such text.
    """
    try:
        with open_file(path) as file:
            content = file.read(most + 1)
    except (OSError, EOFError, zlib.error) as error:  # a disk that fails, a damaged .gz
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error
    if len(content) > most:
        raise ValueError(f"cannot read {shown_path(path)}: it is larger than {most} bytes")
    try:
        return _decoded(content, "utf-8", path)
    except ValueError as error:
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error


def read_lines(path: str | os.PathLike[str], most: int = MOST_BYTES) -> Iterator[tuple[int, str]]:
    """Reads the lines of a file (.gz or not) one by one, each with its number from 1 on.

    Raises:
        ValueError: it cannot be read, a line is larger than `most` bytes, or is no UTF-8 text.
    """
    name, number, size, limit = shown(Path(path).name), 0, 0, float("inf")
    try:
        with open_file(path) as file:
            if isinstance(file, gzip.GzipFile):
                limit = max(_UNPACKED, _MOST_RATIO * os.stat(path).st_size)
            while line := file.readline(most + 1):
                number, size = number + 1, size + len(line)
                if len(line) > most:
                    raise ValueError(f"it is larger than {most} bytes")
                if size > limit:
                    raise ValueError(f"the file unpacks to more than {_MOST_RATIO} times its size")
                yield number, _decoded(line, "utf-8-sig", path) if number == 1 else _decoded(line, "utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ValueError) and not number and str(error).startswith("cannot read"):
            raise
        raise ValueError(f"{name}, line {max(number, 1)}: cannot be read ({reason_of(error)})") from error


_FORMATS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
}  # fmt: skip
"""What a file is that starts so."""


def _decoded(content: bytes, encoding: str, path: str | os.PathLike[str] | None = None) -> str:
    """UTF-8 text; path: of the file that the content starts.

    Raises:
        ValueError: it is none; the message says what it may be, and the cure.
    """
    kind = next((kind for start, kind in _FORMATS.items() if content.startswith(start)), None) if path else None
    if path and kind is None and b"\0" in content[:4]:
        kind = "UTF-32" if b"\0\0" in content[:4] else "UTF-16"
    if kind == "gzip":
        twice = os.fspath(path or "").lower().endswith(".gz")
        raise ValueError("it is compressed twice: unpack it once" if twice else "it is compressed: name it .gz")
    if kind is not None:
        cure = "save it as UTF-8" if kind.startswith("UTF") else "write its content as a file of text in UTF-8"
        raise ValueError(f"it is {kind}, not text in UTF-8: {cure}")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        wrong = f"{reason_of(error)}: it is no text in UTF-8, perhaps in Latin-1 or Windows-1252"
        raise ValueError(f"{wrong}: save it as UTF-8") from error


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
    text = read_text(path, _MOST_JSON)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{shown_path(path)} is damaged: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown_path(path)} is damaged: it holds no JSON object")
    return content


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of `name: value` lines, without aliases; an empty one is empty.

    Raises:
        ValueError: it cannot be read, or it holds something else.
    """
    text = read_text(path, _MOST_YAML)
    try:
        content = _PlainLoader(text).get_single_data()
        _check_values(content)
    except Exception as error:  # PyYAML raises anything for a value that is not of its tag (!!int "", !!bool x)
        raise ValueError(f"{shown_path(path)} is not YAML: {reason_of(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{shown_path(path)} must hold `option: value` lines")
    return content


def check_pattern(pattern: str) -> None:
    """Checks a regular expression: that re and regex know it alike, and that it is small when it is written out.

    Raises:
        ValueError: it is none, or too large.
    """
    try:
        _compiled(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{shown(pattern)} is no regular expression: {reason_of(error)}") from error


class Matcher:
    """Regular expressions on names, which together may take half a second."""

    def __init__(self) -> None:
        self._left = _SECONDS

    def matches(self, pattern: str, name: str, *, end: bool = False) -> bool:
        """Whether a pattern fits a whole name, or (end) the whole name or what follows a dot.

        Raises:
            ValueError: it is none, or the time is over.
        """
        check_pattern(pattern)
        start, fit = time.perf_counter(), _compiled(rf"(.*\.)?({pattern})" if end else pattern).fullmatch
        try:
            return fit(name, timeout=max(self._left, 1e-3)) is not None
        except (TimeoutError, MemoryError) as error:
            raise ValueError(
                f"the pattern {shown(pattern)} takes too long for {shown(name)}: write one without nested "
                "repetitions, or list the names"
            ) from error
        finally:
            if (spent := time.perf_counter() - start) > 1e-3:  # others cannot add up to much
                self._left -= spent


def check_names(names: Any, what: str, *, most: int = 10_000, for_folders: bool = False) -> tuple[str, ...]:
    """Checks names out of a file: a list of different, printable strings of 1 to 1,000 bytes.

    Args:
        names: what the file holds.
        what: opens the message of an error.
        most: how many there may be.
        for_folders: each is to name a folder as well: at most 200 bytes, no slash, no "." or "..".

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
    if (twice := _twice(names)) is not None:
        raise ValueError(f"{what}: {shown(twice)} is there twice")
    return tuple(names)


def _unfit_name(name: Any, *, for_folders: bool) -> str | None:
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}, not text"
    most = _MOST_FOLDER if for_folders else _MOST_NAME
    if not 1 <= len(name[: most + 1].encode("utf-8", "surrogatepass")) <= most or name != name.strip():
        return f"a name has 1 to {most} bytes and no space at its ends"
    if not name.isprintable():
        return "a name is printable"
    if for_folders and (name in (".", "..") or "/" in name or "\\" in name):
        return "a folder's name is not . or .. and holds no slash"
    return None


def _twice(items: Iterable[Any]) -> Any:
    """The first item that was there before, or None."""
    seen = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


class _PlainLoader(yaml.SafeLoader):
    """YAML's plain data, each key once; no aliases and no merged keys: a few of them name billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases (*name): write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError("it merges keys (<<): write them out")
        pairs = [self.construct_object(key, deep=True) for key, _ in node.value]
        if (twice := _twice(map(repr, pairs))) is not None:
            raise yaml.YAMLError(f"the key {twice} is there twice")
        return super().construct_mapping(node, deep)


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    """A pattern of bounded size; without what only regex knows (calls of groups, fuzzy matching, properties)."""
    if len(pattern) > _MOST_PATTERN + 20:
        raise ValueError(f"it is longer than {_MOST_PATTERN} letters")
    plain = re.sub(r"\\[^pPNLgGKRX]", "", pattern)
    if odd := re.search(rf"\\.|\(\?(?!{_SAME_AS_RE}).?|\{{(?!\d*,?\d*\}}).?", plain):
        raise ValueError(f"it holds {odd[0]!r}")
    counts = [max(int(count[:9] or 1) for count in pair) for pair in re.findall(r"\{(\d*),?(\d*)\}", plain)]
    if math.prod(max(count, 1) for count in counts) > _MOST_COUNT:
        raise ValueError(f"its counts multiply to more than {_MOST_COUNT}")
    return regex.compile(pattern)


def _check_values(value: Any) -> None:
    """Checks that values are what JSON knows, how deep brackets are nested, and that integers fit into 64 bits."""
    level: list[Any] = [value]
    for _ in range(_MOST_DEPTH):
        for item in level:
            if isinstance(item, int) and not -_INT64 <= item < _INT64:
                raise ValueError(f"the number {shown(item)} is out of range")
            if not isinstance(item, (str, int, float, list, dict, type(None))):
                raise ValueError(f"it holds a {type(item).__name__}: write text in quotes")
        level = [item for items in level for item in _items(items)]
        if not level:
            return
    raise ValueError(f"its brackets are nested more than {_MOST_DEPTH} deep")


def _items(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"the key {shown(_twice(key for key, _ in pairs))} is there twice")
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
