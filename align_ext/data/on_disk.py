"""Examples and encoded rows on disk, so that a data set may be larger than memory.

Temporary files hold them, in the folder that TMPDIR names. Of each example about 100 bytes stay in memory.
"""

import hashlib
import itertools
import json
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import datasets
import numpy as np
import pyarrow

from align_ext.data.rows import Example

_IN_MEMORY = 64 << 20  # bytes of examples that are kept in memory; more of them are in a file
_BATCH = 1000  # encoded rows that are written at once
_TYPES = {"attention_mask": pyarrow.int8()}  # of the entries of columns; others are int32
_COMPARED = ("task", "prompt", "answer", "choices", "label", "also", "calls", "ends")  # the fields of an example
_OTHER = ("golds", "where")
_KEY, _ID = 32, 16  # bytes


class ExampleStore:
    """Holds examples as JSON, in a file without a name as soon as they are many.

    A scorer, which is code, stays in memory: generated examples have one.
    """

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(_IN_MEMORY)  # noqa: SIM115 (as long as the store lives)
        self._starts = array("q", [0])
        self._keys, self._ids = bytearray(), bytearray()
        self._tasks: dict[str, int] = {}
        self._task_of = array("i")
        self._scorers: dict[int, Callable[[str], float]] = {}

    def __len__(self) -> int:
        return len(self._task_of)

    def __getitem__(self, index: int) -> Example:
        """Returns an equal of the example that was added."""
        start, end = self._starts[index : index + 2]
        self._file.seek(start)
        compared, other = json.loads(self._file.read(end - start))
        values = dict(zip(_COMPARED + _OTHER, compared + other, strict=True))
        if not isinstance(values["prompt"], str):
            values["prompt"] = tuple(map(tuple, values["prompt"]))
        for name in ("choices", "also", "golds"):
            values[name] = tuple(values[name])
        return Example(**values, scorer=self._scorers.get(index))

    def add(self, example: Example) -> int:
        """Adds an example, and returns its index."""
        index = len(self)
        compared, other = (json.dumps([getattr(example, name) for name in names]) for names in (_COMPARED, _OTHER))
        self._file.seek(self._starts[-1])
        self._starts.append(self._starts[-1] + self._file.write(f"[{compared}, {other}]".encode()))
        self._keys += _key(example, 0)
        self._ids += hashlib.blake2b(compared.encode(), digest_size=_ID).digest()
        self._task_of.append(self._tasks.setdefault(example.task, len(self._tasks)))
        if example.scorer is not None:
            self._scorers[index] = example.scorer
        return index

    def keys(self, indices: Sequence[int]) -> np.ndarray:
        """Returns the keys that order examples by their contents (seed 0), 32 bytes each."""
        return np.frombuffer(self._keys, np.uint8).reshape(-1, _KEY)[indices]

    def by_task(self, indices: Iterable[int]) -> dict[str, list[int]]:
        """Divides indices by the task of their examples."""
        found: dict[int, list[int]] = {}
        for index in indices:
            found.setdefault(self._task_of[index], []).append(index)
        names = list(self._tasks)
        return {names[task]: part for task, part in found.items()}

    def different(self, indices: Sequence[int]) -> int:
        """Counts the examples that are not equal to others."""
        ids = np.frombuffer(self._ids, f"V{_ID}")[np.asarray(indices, np.int64)]
        return len(np.unique(ids))


class Examples(Sequence[Example]):
    """A sequence of examples of a store, which are read as they are asked for.

    Args:
        store: the store.
        indices: the indices of the examples.
    """

    def __init__(self, store: ExampleStore, indices: Iterable[int] = ()) -> None:
        self._store, self._indices = store, array("q", indices)

    __hash__ = None  # type: ignore[assignment]  # it grows

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        """Returns an example, or the examples of a slice."""
        if isinstance(index, slice):
            return Examples(self._store, self._indices[index])
        return self._store[self._indices[index]]

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(one == two for one, two in zip(self, other, strict=True))

    def add(self, examples: Iterable[Example]) -> "Examples":
        """Adds examples to the store and to the end; returns itself."""
        self._indices.extend(self._store.add(example) for example in examples)
        return self

    def joined(self, others: "Iterable[Examples]") -> "Examples":
        """Returns these examples and others of the same store."""
        return Examples(self._store, itertools.chain(self._indices, *(other._indices for other in others)))

    def at(self, positions: Iterable[int]) -> "Examples":
        """Returns the examples at some positions."""
        return Examples(self._store, (self._indices[position] for position in positions))

    def by_task(self) -> "dict[str, Examples]":
        """Divides them by task, in the order of each task's first example."""
        return {task: Examples(self._store, part) for task, part in self._store.by_task(self._indices).items()}

    def ordered(self, seed: int) -> "Examples":
        """Returns them in an order that depends on their prompts, answers and the seed only."""
        keys = self._store.keys(self._indices)
        if seed != 0:
            keys = np.frombuffer(b"".join(_key(example, seed) for example in self), np.uint8).reshape(-1, _KEY)
        numbers = np.ascontiguousarray(keys).view(">u8")  # which compare like the bytes
        return self.at(np.lexsort(numbers.T[::-1]).tolist())

    def repeated(self) -> int:
        """Returns how many of them repeat another one."""
        return len(self) - self._store.different(self._indices)


def _key(example: Example, seed: int) -> bytes:
    text = f"{seed}\0{example.prompt}\0{example.answer}"
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


def rows_on_disk(rows: Iterable[Mapping[str, Any]]) -> datasets.Dataset:
    """Writes encoded rows to a file and maps it into memory; the file goes with the result.

    Args:
        rows: rows with the same columns of integers or lists of integers, in [-2^31, 2^31), or [-128, 128) for
            attention_mask; one or more.
    """
    rows = iter(rows)
    first = next(rows)
    fields = []
    for name, value in first.items():
        kind = _TYPES.get(name, pyarrow.int32())
        fields.append((name, pyarrow.list_(kind) if isinstance(value, list) else kind))
    schema = pyarrow.schema(fields)
    folder = tempfile.TemporaryDirectory(prefix="align-lora-")
    file = Path(folder.name, "rows.arrow")
    with pyarrow.OSFile(str(file), "wb") as out, pyarrow.ipc.new_stream(out, schema) as writer:
        for batch in _batches(itertools.chain([first], rows)):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(batch, schema))
    found = datasets.Dataset.from_file(str(file))
    weakref.finalize(found, folder.cleanup)
    return found


def _batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[list[Mapping[str, Any]]]:
    rows = iter(rows)
    while batch := list(itertools.islice(rows, _BATCH)):
        yield batch
