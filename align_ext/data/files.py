"""Reads the rows of one file: JSON lines, a JSON list, CSV, TSV, Parquet or plain text, each row with its location."""

import csv
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from align_ext.data.named_source import COLUMNS
from align_ext.system.messages import reason_of, shown, shown_path
from align_ext.system.reading import MAX_ROW_BYTES, MEBIBYTE, open_file, parse_json, read_lines

_MAX_ARRAY_BYTES = 256 * MEBIBYTE  # the largest file with one JSON list, which is read at once
_BATCH = 256  # rows of a Parquet file that are read at once
_ENDING = re.compile(r"\.(?:(jsonl|json|csv|tsv|txt)(?:\.gz)?|(parquet))$", re.IGNORECASE)
_NESTED = ("choices", "options", "messages", "conversations", "tools")  # columns of lists, which a table has as JSON
READ = (
    "rows are read from .jsonl files, a JSON object a line, .json files, a list of objects, .csv and .tsv files with a "
    "line of names, .txt files, a text a line (.gz too), and .parquet files"
)


def is_rows(name: str) -> bool:
    """Whether the name of a file is one of a file of rows."""
    return _ENDING.search(name) is not None


def stem(file: Path) -> str:
    """Returns the name of a file of rows without its endings."""
    return _ENDING.sub("", file.name)


def rows_of(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields each row of a file with its location for messages.

    Raises:
        ValueError: the file cannot be read, or holds no rows.
    """
    match = _ENDING.search(file.name)
    kind = "" if match is None else (match[1] or match[2]).lower()
    readers = {"csv": _table, "tsv": _table, "txt": _texts, "parquet": _parquet}
    rows = readers.get(kind, _json)(file)
    first = next(rows, None)
    if first is None:
        where = f"the folder {shown_path(file.parent)}"
        raise ValueError(f"{shown(file.name)} holds no rows: write some into it, or take it out of {where}")
    yield from itertools.chain([first], rows)


def values_of_texts(where: str, row: Mapping[str, str]) -> dict[str, Any]:
    """Returns the row of a table of texts with the types of its columns.

    A label that is written as an integer is one, the columns of lists are JSON, and what is written as a number in a
    column that no example uses counts as a number. All other texts stay as they are.

    Raises:
        ValueError: the column of a list holds no JSON; the message begins with `where`.
    """
    try:
        return {name: _value_of_text(name, text) for name, text in row.items()}
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def is_table_of_texts(file: Path) -> bool:
    """Whether a file's columns have no types."""
    return re.search(r"\.[ct]sv(?:\.gz)?$", file.name, re.IGNORECASE) is not None


def _value_of_text(name: str, text: str) -> Any:
    if name == "label" and re.fullmatch(r"-1|0|[1-9]\d{0,8}", text):
        return int(text)
    if name in _NESTED and text.strip():
        try:
            return parse_json(text)
        except ValueError as error:
            raise ValueError(
                f"the column {name} holds {shown(text)}: in a table of texts it must be JSON, a list in brackets "
                f"({reason_of(error)})"
            ) from error
    if name not in COLUMNS:
        try:
            return float(text)
        except ValueError:
            return text
    return text


def _json(file: Path) -> Iterator[tuple[str, Any]]:
    name, empty = shown(file.name), True
    lines = read_lines(file, _MAX_ARRAY_BYTES)
    for number, line in lines:
        if not line.strip():
            continue
        if empty and line.lstrip().startswith("["):
            yield from _array(name, itertools.chain([line], (rest for _, rest in lines)))
            return
        empty, where = False, f"{name}, line {number}"
        if len(line) > MAX_ROW_BYTES:
            raise ValueError(f"{where}: it is larger than {MAX_ROW_BYTES} bytes")
        yield where, _parse(where, line)


def _array(name: str, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields each row of a file with one JSON list."""
    pieces, size = [], 0
    for line in lines:
        pieces.append(line)
        size += len(line)
        if size > _MAX_ARRAY_BYTES:
            raise ValueError(f"{name} is larger than {_MAX_ARRAY_BYTES} bytes: write a JSON object a line, not a list")
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(_parse(name, "".join(pieces)), start=1))


def _parse(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: cannot be read ({reason_of(error)})") from error


def _texts(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields each line of a file as a row with the column text."""
    name = shown(file.name)
    for number, line in read_lines(file):
        if line.strip():
            yield f"{name}, line {number}", {"text": line.rstrip("\r\n")}


def _table(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields each row of a CSV or TSV file as texts; nothing is guessed, and no row is shorter or longer than others.

    A quoted field may hold line breaks; a row's location is its last line. A first column without a name is pandas'
    index.
    """
    name, tab = shown(file.name), ".tsv" in file.name.lower()[-7:]
    csv.field_size_limit(MAX_ROW_BYTES)
    reader = csv.reader((line for _, line in read_lines(file)), delimiter="\t" if tab else ",", strict=True)
    header: list[str] | None = None
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise ValueError(
                f"{name}, line {reader.line_num}: cannot be read ({reason_of(error)}): a field with a quote is quoted "
                'itself, and its quotes are doubled ("")'
            ) from error
        if cells is None:
            return
        where = f"{name}, line {reader.line_num}"
        if header is None:
            header = _header(where, cells, tab=tab)
        elif cells and len(cells) != len(header):
            raise ValueError(f"{where}: it has {len(cells)} fields, and the line of names has {len(header)}")
        elif cells:
            yield where, dict(zip(header, cells, strict=True))


def _header(where: str, names: list[str], *, tab: bool) -> list[str]:
    """Checks the names of a table's columns."""
    names = ["index" if number == 0 and not name.strip() else name.strip() for number, name in enumerate(names)]
    unnamed = next((number for number, name in enumerate(names, start=1) if not name), None)
    if not names or unnamed:
        raise ValueError(f"{where}: column {unnamed or 1} has no name: the first line of a table names its columns")
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise ValueError(f"{where}: two columns have the name {shown(double)}")
    other = ";" if not tab and ";" in names[0] else "," if tab and "," in names[0] else "\t" if not tab else ""
    if len(names) == 1 and other and other in names[0]:
        raise ValueError(
            f"{where}: its names are separated by {shown(other)}: a .csv file has commas, and a .tsv file tabs"
        )
    return names


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    name, number = shown(file.name), 0
    open_file(file).close()  # raises for what is no ordinary file
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(_BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", without_nulls(row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}, row {number + 1}: cannot be read ({reason_of(error)})") from error


def without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a row of a typed table without nulls in its objects, where names stand that only other rows have."""
    return {name: _without_nulls(value) for name, value in row.items()}


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    return [_without_nulls(part) for part in value] if isinstance(value, list) else value
