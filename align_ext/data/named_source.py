"""The sources of data that a user names: a path or hub id, with a name, a split and columns."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from align_ext.system.bounds import is_whole, unknown_name
from align_ext.system.messages import shown
from align_ext.system.names import check_names

SPLITS = ("train", "validation", "test")
COLUMNS = (
    "task", "prompt", "instruction", "context", "passage", "input", "question", "completion", "output", "response",
    "answer", "answers", "choices", "options", "label", "answerKey", "messages", "conversations", "tools", "system",
    "system_prompt", "text",
)  # fmt: skip
"""The columns that a row may have (see align_ext/data/rows.py)."""
_KEYS = ("path", "name", "split", "columns", "rows")
_NAMED = re.compile(r"([^=/\\]+)=(.+)", re.DOTALL)


@dataclass(frozen=True)
class NamedSource:
    """One source of rows.

    Attributes:
        path: a file, a folder, or the id of a hub dataset.
        name: the task of rows without a column task, and the first part (name.task) of the tasks of others; None: the
            name of the file or dataset, and the tasks as they are.
        split: of a file, the split of its rows (train, validation or test; None: the one that its name says); of a
            dataset, the name of the only one of its splits to read.
        columns: column of a row -> its name in the source.
        rows: the most rows of each of its splits that are read, the first ones; a hub dataset is then streamed, not
            downloaded. None: all.
    """

    path: str
    name: str | None = None
    split: str | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    rows: int | None = None

    def __post_init__(self) -> None:
        for what in ("path", "name", "split"):
            if not isinstance(getattr(self, what), str) and (what == "path" or getattr(self, what) is not None):
                raise ValueError(f"data: {what}={shown(getattr(self, what))} must be text")
        if self.rows is not None and not is_whole(self.rows, 1, 10**9):
            raise ValueError(f"data: rows={shown(self.rows)} must be a positive integer")
        if self.name is not None:
            check_names([self.name], "data: name")


def named_sources(data: Any, columns: Iterable[str] | Mapping[str, str] = ()) -> tuple[NamedSource, ...]:
    """Reads the value of the option data.

    Args:
        data: a source or a list of them, each a text, "path" or "name=path", or a mapping {path, name, split, columns,
            rows}; None: no source.
        columns: the columns of all sources that name none of their own (see `column_names`).

    Raises:
        ValueError: the value is something else, an entry is unknown (the message suggests one), or a source is there
            twice.
    """
    given = [] if data is None else data if isinstance(data, (list, tuple)) else [data]
    shared = column_names(columns)
    sources = tuple(_named_source(one, shared) for one in given)
    for number, source in enumerate(sources):
        if source in sources[:number]:
            raise ValueError(f"data: {shown(source.path)} is there twice")
    return sources


def column_names(columns: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """Reads the names of columns.

    Args:
        columns: a mapping, column of a row -> its name in the source, or texts "column=name".

    Raises:
        ValueError: it is no such mapping or text, or a column or name is there twice.
    """
    pairs = pairs_of(columns, "columns", "prompt=question")
    for ours, theirs in pairs.items():
        if ours not in COLUMNS:
            raise ValueError(f"columns: {unknown_name('column of a row', ours, COLUMNS)}")
        if list(pairs.values()).count(theirs) > 1:
            raise ValueError(f"columns: {shown(theirs)} is there twice")
    return pairs


def pairs_of(given: Any, option: str, example: str, *, last: bool = False) -> dict[str, str]:
    """Reads a mapping of texts, or a list of texts "name=value", as a dictionary of texts.

    The first equality sign ends the name, or with `last` the last one.

    Raises:
        ValueError: it is something else, or a name is there twice; the message has the option's name and an example.
    """
    if isinstance(given, Mapping):
        items = [(str(name), str(value)) for name, value in given.items() if isinstance(value, (str, int, float))]
        found = items if len(items) == len(given) else []
    else:
        texts = given if isinstance(given, (list, tuple)) and all(isinstance(text, str) for text in given) else ()
        parts = (text.rpartition("=") if last else text.partition("=") for text in texts)
        found = [(name.strip(), value.strip()) for name, _, value in parts]
    if len(found) < len(given) or not all(name and value for name, value in found):
        raise ValueError(f"{option} must be pairs such as {example}, got {shown(given)}")
    for name, _ in found:
        if [other for other, _ in found].count(name) > 1:
            raise ValueError(f"{option}: {shown(name)} is there twice")
    return dict(found)


def _named_source(given: Any, columns: Mapping[str, str]) -> NamedSource:
    if isinstance(given, str):
        named = None if os.path.exists(os.path.expanduser(given)) else _NAMED.fullmatch(given)
        return NamedSource(given, columns=columns) if named is None else NamedSource(named[2], named[1], None, columns)
    if not isinstance(given, Mapping):
        raise ValueError(f"data: a source is a text or a mapping of {', '.join(_KEYS)}, got {shown(given)}")
    for key in given:
        if key not in _KEYS:
            raise ValueError(f"data: {unknown_name('entry of a source', key, _KEYS)}")
    if "path" not in given:
        raise ValueError(f"data: the source {shown(dict(given))} has no path")
    own = given.get("columns")
    return NamedSource(
        given["path"], given.get("name"), given.get("split"), columns if own is None else column_names(own),
        given.get("rows"),
    )  # fmt: skip
