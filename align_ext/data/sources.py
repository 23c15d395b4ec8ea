"""Reads the rows of a file, a folder of files or a hub dataset as examples in splits."""

import itertools
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError

from align_ext.data.conversation import text_asked
from align_ext.data.metadata import Texts, text_lost
from align_ext.data.rows import Example, example_of
from align_ext.system.messages import reason_of, shown
from align_ext.system.reading import MAX_ROW_BYTES, MEBIBYTE, parse_json, read_lines

_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
}  # fmt: skip
_SPLIT_WORD = re.compile(rf"(?:^|[._-])({'|'.join(_SPLITS)})(?=[._-]|$)", re.IGNORECASE)
_SHARD = re.compile(r"-\d+-of-\d+$")
_NO_DATA = re.compile(r"(?:\..*|(?:readme|manifest|licen[cs]e)(?:\..*)?|.*\.md)", re.IGNORECASE)
_MAX_ARRAY_BYTES = 256 * MEBIBYTE  # the largest file with one JSON list, which is read at once
_READ = "rows are read from .jsonl files, a JSON object a line, and .json files, a list of objects (.gz too)"


@dataclass
class Source:
    """Rows by split: train, test, validation, or "" if the split is not known.

    Attributes:
        splits: the examples by split.
        unused: the number of rows for each column that the examples do not use.
        skipped: the files and splits that were not read.
    """

    splits: dict[str, list[Example]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    _texts: dict[str, Texts] = field(default_factory=dict)

    def add(self, split: str, rows: Iterable[tuple[str, Any]], task: str, ignore: Collection[str]) -> None:
        """Reads rows, each with its location for messages; `task` is the task of rows without a column task."""
        examples = self.splits.setdefault(split, [])
        named: bool | None = None
        for where, row in rows:
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {shown(row)} is no JSON object")
            example, unused = example_of(row, where, None if named else task, ignore)
            if named is not None and named != ("task" in row):
                raise ValueError(
                    f"{where}: it has a column task, which rows before it lack: give one to all or to none"
                )
            named = "task" in row
            examples.append(example)
            for name in unused:
                self.unused[name] = self.unused.get(name, 0) + 1
                if name not in ignore and (text := text_lost(row[name], text_asked(example.prompt))):
                    self._texts.setdefault(name, Texts(name)).add(text, example.task)

    def check_unused(self) -> None:
        """Raises ValueError for a column with the name of metadata that holds content."""
        for name, texts in self._texts.items():
            if lost := texts.would_be_lost():
                raise ValueError(
                    f"the column {shown(name, 40)[1:-1]} would be lost, with texts such as {shown(lost, 40)}: put it "
                    "into prompt or context, or leave it out with --ignore-columns"
                )


def read_source(data: str, ignore: Collection[str] = ()) -> Source:
    """Reads every row of a file, a folder or a hub dataset.

    Args:
        data: its path, or its id on the hub, "owner/name" or "owner/name:configuration".
        ignore: columns to leave out.

    Raises:
        ValueError: there are no such data, or a file or a row cannot be used.
    """
    source, path = Source(), Path(os.path.expanduser(data))
    try:
        mode = path.stat().st_mode if data else None
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the data {shown(data)}: {reason_of(error)}") from error
    if mode is not None and stat.S_ISDIR(mode):
        files = _files(path, source)
        for file in files:
            source.add(_split_of(file), _rows(file), _task_of(file), ignore)
    elif mode is not None:
        if not _is_rows(path.name):
            raise ValueError(f"cannot read the data {shown(data)}: {_READ}")
        source.add("", _rows(path), _task_of(path), ignore)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", data) and not _is_rows(data):
        _add_dataset(source, data, _from_hub(data), ignore)
    else:
        raise ValueError(f"there is no data file or folder {shown(data)}")
    source.check_unused()
    return source


def _files(folder: Path, source: Source) -> list[Path]:
    """Returns the data files of a folder; other files are skipped if their names allow it, and otherwise refused."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"cannot read the folder {shown(str(folder))}: {reason_of(error)}") from error
    files = [name for name in names if _is_rows(name) and not name.startswith(".")]
    source.skipped = [name for name in names if name not in files and _NO_DATA.fullmatch(name)]
    others = [name for name in names if name not in files and name not in source.skipped]
    if others:
        raise ValueError(
            f"the folder {shown(str(folder))} holds {shown(others[0])}, and {_READ}: convert it (datasets' to_json "
            "does) or move it away"
        )
    if not files:
        raise ValueError(f"the folder {shown(str(folder))} holds no data: {_READ}")
    return [folder / name for name in files]


def _is_rows(name: str) -> bool:
    return name.lower().removesuffix(".gz").endswith((".jsonl", ".json"))


def _stem(file: Path) -> str:
    return re.sub(r"\.jsonl?(?:\.gz)?$", "", file.name, flags=re.IGNORECASE)


def _split_of(file: Path) -> str:
    splits = {_SPLITS[word.lower()] for word in _SPLIT_WORD.findall(_stem(file))}
    if len(splits) > 1:
        raise ValueError(f"the name {shown(file.name)} says {' and '.join(sorted(splits))}: let it name one split")
    return splits.pop() if splits else ""


def _task_of(file: Path) -> str:
    """Returns a file's task: its name without the split, or the folder's name if nothing else is left."""
    name = _SPLIT_WORD.sub("", _SHARD.sub("", _stem(file))).strip("._- ")
    return name or file.resolve().parent.name or "data"


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    """Yields each row of a file with its location."""
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
    if empty:
        raise ValueError(f"{name} holds no rows")


def _array(name: str, lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yields each row of a file with one JSON list."""
    pieces, size = [], 0
    for line in lines:
        pieces.append(line)
        size += len(line)
        if size > _MAX_ARRAY_BYTES:
            raise ValueError(f"{name} is larger than {_MAX_ARRAY_BYTES} bytes: write a JSON object a line, not a list")
    rows = _parse(name, "".join(pieces))
    if not rows:
        raise ValueError(f"{name} holds no rows")
    yield from ((f"{name}, row {number}", row) for number, row in enumerate(rows, start=1))


def _parse(where: str, text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: cannot be read ({reason_of(error)})") from error


def _from_hub(name: str) -> Any:
    """Loads a hub dataset, or its copy in the local cache, with the datasets package."""
    import datasets

    from align_ext.base_model.hub import ask_hub

    repository, _, configuration = name.partition(":")
    cached = Path(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___")).is_dir()
    # The hub is asked first, because load_dataset retries for half a minute without a network.
    error = None if cached else ask_hub(repository, "README.md", "dataset")
    if error is None or isinstance(error, EntryNotFoundError):
        try:
            return datasets.load_dataset(repository, configuration or None)
        except Exception as failure:  # connection, configuration, format: datasets has no common class for them
            error = failure
    raise ValueError(f"there is no data file or folder {name!r}, and the hub gives no such dataset: {reason_of(error)}")


def _add_dataset(source: Source, name: str, loaded: Any, ignore: Collection[str]) -> None:
    """Adds the rows of a DatasetDict: its train split, and its test split or else its validation split."""
    known = {split: _SPLITS[split] for split in _SPLITS if split in loaded}
    if "train" not in known:
        raise ValueError(f"the dataset {name!r} has no split train (it has {', '.join(map(shown, loaded))})")
    held_out = next((split for wanted in ("test", "validation") for split in known if known[split] == wanted), None)
    task = name.partition("/")[2].replace(":", "-")
    for split in loaded:
        if split in ("train", held_out):
            rows = _table(name, split, loaded[split])
            source.add(known[split] if held_out else "", rows, task, ignore)
        else:
            source.skipped.append(f"split {split} ({len(loaded[split]):,} rows)")


def _table(name: str, split: str, table: Any) -> Iterator[tuple[str, Any]]:
    rows = iter(table)
    for number in range(len(table)):
        where = f"{name}, {split}, row {number}"
        try:
            row = next(rows)
        except Exception as error:  # for example, a column of images in an unknown format
            raise ValueError(f"{where}: cannot be read ({reason_of(error)})") from error
        yield where, row
