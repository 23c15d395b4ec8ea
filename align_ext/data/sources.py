"""Reads the rows of a file, a folder of files or a hub dataset as examples in splits."""

import itertools
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from huggingface_hub.errors import EntryNotFoundError

from align_ext.data.conversation import text_asked
from align_ext.data.files import READ, is_rows, is_table_of_texts, rows_of, stem, values_of_texts, without_nulls
from align_ext.data.metadata import Texts, text_lost
from align_ext.data.named_source import SPLITS, NamedSource
from align_ext.data.on_disk import Examples, ExampleStore
from align_ext.data.rows import example_of, is_empty
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import reason_of, shown

_SPLITS = {
    "train": "train", "training": "train", "test": "test", "testing": "test", "validation": "validation",
    "valid": "validation", "val": "validation", "dev": "validation", "eval": "validation",
}  # fmt: skip
_SPLIT_WORD = re.compile(rf"(?:^|[._-])({'|'.join(_SPLITS)})(?=[._-]|$)", re.IGNORECASE)
_SHARD = re.compile(r"-\d+-of-\d+$")
_NO_ROWS = re.compile(r"\..*|(?:readme|manifest|licen[cs]e|requirements)\.txt", re.IGNORECASE)
_NO_DATA = re.compile(r"(?:\..*|(?:readme|manifest|licen[cs]e|requirements)(?:\..*)?|.*\.md)", re.IGNORECASE)


@dataclass
class Source:
    """Rows by split: train, test, validation, or "" if the split is not known.

    Attributes:
        splits: the examples by split.
        unused: the number of rows for each column that the examples do not use.
        skipped: the files and splits that were not read.
        given: what the user named.
        store: holds the examples.
        cut: notes on splits of which the first rows alone were read.
        alone: of one file or one split of a dataset, whose rows have the split "", the name that says their split.
    """

    splits: dict[str, Examples] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    given: NamedSource = field(default_factory=lambda: NamedSource(""))
    alone: str | None = None
    store: ExampleStore = field(default_factory=ExampleStore)
    cut: list[str] = field(default_factory=list)
    _texts: dict[str, Texts] = field(default_factory=dict)
    _columns: dict[str, None] = field(default_factory=dict)  # all names of columns, in their order

    def add(
        self, split: str, rows: Iterable[tuple[str, Any]], task: str, ignore: Collection[str], *, texts: bool = False
    ) -> None:
        """Reads rows, each with its location for messages.

        Args:
            split: the split of the rows.
            rows: the rows.
            task: the task of rows without a column task, if the source has no name.
            ignore: columns to leave out.
            texts: whether the rows are those of a table whose columns have no types.
        """
        examples, prefix = self.splits.setdefault(split, Examples(self.store)), self.given.name
        task = prefix or task
        named: bool | None = None
        for where, row in rows:
            if len(examples) == self.given.rows:
                part = f" of {split}" * bool(split)
                self.cut.append(f"{shown(self.given.path)}: only the first {self.given.rows:,} rows{part} are read")
                break
            if not isinstance(row, dict):
                raise ValueError(f"{where}: {shown(row)} is no JSON object")
            row = self._renamed(where, row)
            if texts:
                row = values_of_texts(where, row)
            example, unused = example_of(row, where, None if named else task, ignore)
            has_task = not is_empty("task", row.get("task")) and "task" not in ignore
            if named is not None and named != has_task:
                raise ValueError(
                    f"{where}: it has a column task, which rows before it lack: give one to all or to none"
                )
            named = has_task
            if named and prefix:
                example = replace(example, task=f"{prefix}.{example.task}")
            examples.add([example])
            for name in unused:
                self.unused[name] = self.unused.get(name, 0) + 1
                if name not in ignore and (text := text_lost(row[name], text_asked(example.prompt))):
                    self._texts.setdefault(name, Texts(name)).add(text, example.task)

    def _renamed(self, where: str, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """Returns a row with the names that the user gives to its columns."""
        if not self.given.columns:
            return row
        self._columns.update(dict.fromkeys(row))
        names = {theirs: ours for ours, theirs in self.given.columns.items()}
        for theirs, ours in names.items():
            if ours in row and theirs in row and ours not in names and row[ours] is not None:
                raise ValueError(f"{where}: it has a column {ours} beside {shown(theirs)}, which columns calls {ours}")
        return {names.get(name, name): value for name, value in row.items()}

    def check_columns(self) -> None:
        """Raises ValueError for a named column that no row has."""
        for theirs in self.given.columns.values():
            if theirs not in self._columns:
                raise ValueError(
                    f"{shown(self.given.path)}: {unknown_name('column', theirs, self._columns)}: --columns holds for "
                    "all sources that name no columns of their own"
                )

    def check_unused(self) -> None:
        """Raises ValueError for a column with the name of metadata that holds content."""
        for name, texts in self._texts.items():
            if lost := texts.would_be_lost():
                raise ValueError(
                    f"the column {shown(name, 40)[1:-1]} would be lost, with texts such as {shown(lost, 40)}: put it "
                    "into prompt or context, or leave it out with --ignore-columns"
                )


def read_source(given: str | NamedSource, ignore: Collection[str] = (), store: ExampleStore | None = None) -> Source:
    """Reads every row of a file, a folder or a hub dataset.

    Args:
        given: its path, or its id on the hub, "owner/name" or "owner/name:configuration".
        ignore: columns to leave out.
        store: gets the examples; None: another one.

    Raises:
        ValueError: there are no such data, a file or a row cannot be used, or a named column is in no row.
    """
    given = NamedSource(given) if isinstance(given, str) else given
    data = given.path
    source, path = Source(given=given), Path(os.path.expanduser(data))
    if store is not None:
        source.store = store
    try:
        mode = path.stat().st_mode if data else None
    except (FileNotFoundError, NotADirectoryError):
        mode = None
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the data {shown(data)}: {reason_of(error)}") from error
    if mode is not None and not stat.S_ISDIR(mode):
        if not is_rows(path.name):
            raise ValueError(f"cannot read the data {shown(data)}: {READ}")
        if given.split not in (None, *SPLITS):
            raise ValueError(f"data: {unknown_name('split', given.split, SPLITS)}")
        source.alone = given.split or stem(path)
        _add_file(source, "", path, ignore)
    elif mode is not None:
        if given.split is not None:
            raise ValueError(f"data: the split of {shown(data)} is in the names of its files: leave split out")
        for file in _files(path, source):
            _add_file(source, split_named(stem(file)), file, ignore)
    elif re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", data) and not is_rows(data):
        _add_dataset(source, data, _from_hub(data, streaming=given.rows is not None), ignore)
    else:
        cure = "patterns are not expanded, so name the folder, or each file"
        cure = cure if re.search(r"[*?\[]", data) else "name one, or a dataset of the hub as owner/name"
        raise ValueError(f"there is no data file or folder {shown(data)}: {cure}")
    source.check_columns()
    source.check_unused()
    return source


def _add_file(source: Source, split: str, file: Path, ignore: Collection[str]) -> None:
    source.add(split, rows_of(file), _task_of(file), ignore, texts=is_table_of_texts(file))


def _files(folder: Path, source: Source) -> list[Path]:
    """Returns the data files of a folder; other files are skipped if their names allow it, and otherwise refused."""
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"cannot read the folder {shown(str(folder))}: {reason_of(error)}") from error
    files = [name for name in names if is_rows(name) and not _NO_ROWS.fullmatch(name)]
    source.skipped = [name for name in names if name not in files and _NO_DATA.fullmatch(name)]
    others = [name for name in names if name not in files and name not in source.skipped]
    if others:
        raise ValueError(
            f"the folder {shown(str(folder))} holds {shown(others[0])}, and {READ}: convert it or move it away"
        )
    if not files:
        raise ValueError(f"the folder {shown(str(folder))} holds no data: {READ}")
    return [folder / name for name in files]


def split_named(name: str) -> str:
    """Returns the split that a name says, or "".

    Raises:
        ValueError: it says several.
    """
    splits = {_SPLITS[word.lower()] for word in _SPLIT_WORD.findall(name)}
    if len(splits) > 1:
        raise ValueError(f"the name {shown(name)} says {' and '.join(sorted(splits))}: let it name one split")
    return splits.pop() if splits else ""


def _task_of(file: Path) -> str:
    """Returns a file's task: its name without the split, or the folder's name if nothing else is left."""
    name = _SPLIT_WORD.sub("", _SHARD.sub("", stem(file))).strip("._- ")
    return name or file.resolve().parent.name or "data"


def _from_hub(name: str, *, streaming: bool) -> Any:
    """Loads a hub dataset, or its copy in the local cache, with the datasets package; or streams it."""
    import datasets

    from align_ext.base_model.hub import ask_hub

    repository, _, configuration = name.partition(":")
    cached = Path(datasets.config.HF_DATASETS_CACHE, repository.replace("/", "___")).is_dir()
    # The hub is asked first, because load_dataset retries for half a minute without a network.
    error = None if cached else ask_hub(repository, "README.md", "dataset")
    if error is None or isinstance(error, EntryNotFoundError):
        try:
            return datasets.load_dataset(repository, configuration or None, streaming=streaming)
        except Exception as failure:  # connection, configuration, format: datasets has no common class for them
            error = failure
    raise ValueError(f"there is no data file or folder {name!r}, and the hub gives no such dataset: {reason_of(error)}")


def _add_dataset(source: Source, name: str, loaded: Any, ignore: Collection[str]) -> None:
    """Adds the rows of a DatasetDict: its train split, and its test split or else its validation split."""
    task = source.given.name or name.partition("/")[2].replace(":", "-")
    if (chosen := source.given.split) is not None:
        if chosen not in loaded:
            raise ValueError(f"the dataset {name!r}: {unknown_name('split', chosen, loaded)}")
        source.alone = chosen
        source.add("", _table(name, chosen, loaded[chosen]), task, ignore)
        return
    known = {split: _SPLITS[split] for split in _SPLITS if split in loaded}
    if "train" not in known:
        raise ValueError(
            f"the dataset {name!r} has no split train (it has {', '.join(map(shown, loaded))}): name one in a file of "
            "options, as   data: [{path: owner/name, split: train_sft}]"
        )
    held_out = next((split for wanted in ("test", "validation") for split in known if known[split] == wanted), None)
    for split in loaded:
        if split in ("train", held_out):
            rows = _table(name, split, loaded[split])
            source.add(known[split] if held_out else "", rows, task, ignore)
        else:
            size = f" ({len(loaded[split]):,} rows)" if hasattr(loaded[split], "__len__") else ""
            source.skipped.append(f"split {split}{size}")


def _table(name: str, split: str, table: Any) -> Iterator[tuple[str, Any]]:
    rows = iter(table)
    for number in itertools.count():
        where = f"{name}, {split}, row {number}"
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # for example, a column of images in an unknown format
            raise ValueError(f"{where}: cannot be read ({reason_of(error)})") from error
        yield where, without_nulls(row)
