"""Reads and checks text, JSON, YAML, names and patterns from files; the size of everything is bounded.

Whatever a file holds, the result is its content or a one-line ValueError that names the file. Nothing here blocks
(a FIFO is refused), recurses without end, or uses memory beyond the limits.
"""

import gzip
import json
import os
import stat
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import yaml

from align_ext.system.messages import reason_of, shown, shown_path
from align_ext.system.names import _first_duplicate

MEBIBYTE = 1 << 20
MAX_ROW_BYTES = 16 * MEBIBYTE  # the largest row of data
_MAX_JSON_BYTES = 4 * MEBIBYTE  # the largest JSON file
_MAX_YAML_BYTES = MEBIBYTE // 16  # the largest YAML file; PyYAML takes seconds for a megabyte
_MAX_RATIO = 100  # a .gz file may unpack to this many times its size, or to _UNPACKED bytes if that is more
_UNPACKED = 256 * MEBIBYTE
_MAX_DEPTH = 64  # the deepest nesting of brackets
_INT64 = 2**63


def check_folder(folder: Any, what: str = "folder") -> None:
    """Raises ValueError if a value cannot be a folder's path."""
    if not isinstance(folder, (str, os.PathLike)) or not isinstance(os.fspath(folder), str):
        raise ValueError(f"{what}={shown(folder)} must be a folder's path, text or a Path")
    if not os.fspath(folder).strip():
        raise ValueError(f"{what}={shown(folder)} is empty: name a folder")


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether a path exists.

    Raises:
        ValueError: it cannot be known, since a folder above it may not be searched.
    """
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error
    return True


def open_file(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens an ordinary file to read its bytes, through gzip if its name ends in .gz.

    Raises:
        ValueError: there is none, it may not be read, or it is a folder, a device or a FIFO.
    """
    try:
        kind = os.stat(path).st_mode  # before opening, since opening a device may have an effect
        if not stat.S_ISREG(kind):
            raise ValueError(f"it is {'a folder' if stat.S_ISDIR(kind) else 'no ordinary file'}")
        file = open(path, "rb")  # noqa: SIM115
    except (OSError, ValueError) as error:  # a path with a null byte is a ValueError
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error
    if not os.fspath(path).lower().endswith(".gz"):
        return file
    unzipped = gzip.GzipFile(fileobj=file, mode="rb")
    unzipped.myfileobj = file  # type: ignore[assignment]  # so that closing unzipped closes the file too
    return unzipped  # type: ignore[return-value]


def read_text(path: str | os.PathLike[str], maximum: int = MAX_ROW_BYTES) -> str:
    """Reads a file of UTF-8 text of limited size.

    Raises:
        ValueError: it cannot be read, is larger, or is no such text.
    """
    try:
        with open_file(path) as file:
            content = file.read(maximum + 1)
    except (OSError, EOFError, zlib.error) as error:  # a failing disk, or a damaged .gz
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error
    if len(content) > maximum:
        raise ValueError(f"cannot read {shown_path(path)}: it is larger than {maximum} bytes")
    try:
        return _decode(content, "utf-8", path)
    except ValueError as error:
        raise ValueError(f"cannot read {shown_path(path)}: {reason_of(error)}") from error


def read_lines(path: str | os.PathLike[str], maximum: int = MAX_ROW_BYTES) -> Iterator[tuple[int, str]]:
    """Reads the lines of a file (.gz or not) one by one, each with its number; the first is 1.

    Raises:
        ValueError: it cannot be read, a line is larger than `most` bytes, or is no UTF-8 text.
    """
    name, number, size, limit = shown(Path(path).name), 0, 0, float("inf")
    try:
        with open_file(path) as file:
            if isinstance(file, gzip.GzipFile):
                limit = max(_UNPACKED, _MAX_RATIO * os.stat(path).st_size)
            while line := file.readline(maximum + 1):
                number, size = number + 1, size + len(line)
                if len(line) > maximum:
                    raise ValueError(f"it is larger than {maximum} bytes")
                if size > limit:
                    raise ValueError(f"the file unpacks to more than {_MAX_RATIO} times its size")
                yield number, _decode(line, "utf-8-sig", path) if number == 1 else _decode(line, "utf-8")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        if isinstance(error, ValueError) and not number and str(error).startswith("cannot read"):
            raise
        raise ValueError(f"{name}, line {max(number, 1)}: cannot be read ({reason_of(error)})") from error


_FORMATS = {
    b"\xff\xfe\0\0": "UTF-32", b"\0\0\xfe\xff": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
    b"\x1f\x8b": "gzip", b"PK\x03\x04": "zip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd",
    b"PAR1": "parquet",
}  # fmt: skip
"""The file format by the first bytes of a file."""


def _decode(content: bytes, encoding: str, path: str | os.PathLike[str] | None = None) -> str:
    """Decodes UTF-8 text; path: the file, if the content is its start.

    Raises:
        ValueError: it is not UTF-8; the message says what it may be, and the cure.
    """
    kind = next((kind for start, kind in _FORMATS.items() if content.startswith(start)), None) if path else None
    if path and kind is None and b"\0" in content[:4]:
        kind = "UTF-32" if b"\0\0" in content[:4] else "UTF-16"
    if kind == "gzip":
        duplicate = os.fspath(path or "").lower().endswith(".gz")
        raise ValueError("it is compressed twice: unpack it once" if duplicate else "it is compressed: name it .gz")
    if kind is not None:
        cure = "save it as UTF-8" if kind.startswith("UTF") else "write its content as a file of text in UTF-8"
        raise ValueError(f"it is {kind}, not text in UTF-8: {cure}")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        wrong = f"{reason_of(error)}: it is no text in UTF-8, perhaps in Latin-1 or Windows-1252"
        raise ValueError(f"{wrong}: save it as UTF-8") from error


def parse_json(text: str) -> Any:
    """Parses JSON strictly by the standard: each key once, no number beyond int64 or float64.

    Raises:
        ValueError: it is not such JSON; the message does not name the file.
    """
    try:
        value = json.loads(
            text, object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_parse_float, parse_int=_parse_int
        )
    except RecursionError as error:
        raise ValueError("its brackets are nested too deep") from error
    _check_values(value)
    return value


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a file with one JSON object.

    Raises:
        ValueError: it cannot be read, or it holds no JSON object.
    """
    text = read_text(path, _MAX_JSON_BYTES)
    try:
        content = parse_json(text)
    except ValueError as error:
        raise ValueError(f"{shown_path(path)} is damaged: {reason_of(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{shown_path(path)} is damaged: it holds no JSON object")
    return content


def read_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a YAML file of `name: value` lines, without aliases; an empty file gives an empty dictionary.

    Raises:
        ValueError: it cannot be read, or it holds something else.
    """
    text = read_text(path, _MAX_YAML_BYTES)
    try:
        content = _PlainLoader(text).get_single_data()
        _check_values(content)
    except Exception as error:  # PyYAML may raise any exception for a value that does not fit its tag (!!int "")
        raise ValueError(f"{shown_path(path)} is not YAML: {reason_of(error)}") from error
    if content is None:
        return {}
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{shown_path(path)} must hold `option: value` lines")
    return content


class _PlainLoader(yaml.SafeLoader):
    """Loads plain YAML data with unique keys, no aliases or merged keys, which may expand to billions of values."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it uses aliases (*name): write the values out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                raise yaml.YAMLError("it merges keys (<<): write them out")
        pairs = [self.construct_object(key, deep=True) for key, _ in node.value]
        if (duplicate := _first_duplicate(map(repr, pairs))) is not None:
            raise yaml.YAMLError(f"the key {duplicate} is there twice")
        return super().construct_mapping(node, deep)


def _check_values(value: Any) -> None:
    """Checks that values are of JSON's types, that nesting is not too deep, and that integers fit into 64 bits."""
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH):
        for item in level:
            if isinstance(item, int) and not -_INT64 <= item < _INT64:
                raise ValueError(f"the number {shown(item)} is out of range")
            if not isinstance(item, (str, int, float, list, dict, type(None))):
                raise ValueError(f"it holds a {type(item).__name__}: write text in quotes")
        level = [item for items in level for item in _nested_values(items)]
        if not level:
            return
    raise ValueError(f"its brackets are nested more than {_MAX_DEPTH} deep")


def _nested_values(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError(f"the key {shown(_first_duplicate(key for key, _ in pairs))} is there twice")
    return result


def _refuse(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _parse_float(text: str) -> float:
    value = float(text)
    if abs(value) == float("inf"):
        raise ValueError(f"the number {shown(text)} is out of range")
    return value


def _parse_int(text: str) -> int:
    if len(text) > 20:
        raise ValueError(f"the number {shown(text)} is out of range")
    return int(text)
