"""Reads the tasks, built-in ones or those of files and hub datasets, and selects examples to train and to score on."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from align_ext.data.generated import BUILTIN_TASKS, DEV, check_generators, generated
from align_ext.data.named_source import named_sources
from align_ext.data.on_disk import Examples, ExampleStore
from align_ext.data.per_task import PerTask
from align_ext.data.rows import Example
from align_ext.data.sources import Source, read_source, split_named
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown

_MAX_TASKS = 10_000
_MAX_LINES = 20  # the most tasks that a report lists
_MAX_NOTE = 300  # the most characters of a note
_NONE = Examples(ExampleStore())


@dataclass(frozen=True)
class Pools:
    """All examples that were read.

    Attributes:
        tasks: task -> split (train, test, validation, or "" if undivided) -> examples, in an order that depends on
            their contents alone: the first ones are scored in every run.
        notes: lines about files, splits and columns that are not used.
        files: whether every source is a file, or one split of a dataset, named by itself.
    """

    tasks: Mapping[str, Mapping[str, Examples]]
    notes: tuple[str, ...] = ()
    files: bool = False

    def examples(self) -> Iterator[Example]:
        """Yields all examples."""
        return (example for splits in self.tasks.values() for part in splits.values() for example in part)


@dataclass(frozen=True)
class Usage:
    """Counts of the used and unused rows of one task and split.

    Attributes:
        rows: the number of rows.
        used: the number of used rows.
        left_out: the number of unused rows by reason.
        repeated: the number of rows that repeat another one; they are used like any other.
    """

    rows: int
    used: int
    left_out: Mapping[str, int]
    repeated: int

    def __str__(self) -> str:
        reasons = [f"{count:,} {reason}" for reason, count in self.left_out.items()]
        reasons += [f"{self.repeated:,} repeated"] if self.repeated else []
        return f"{self.used:,} of {self.rows:,}" + (f" ({', '.join(reasons)})" if reasons else "")


@dataclass(frozen=True)
class TaskData:
    """Examples to train on and examples to score on; a task's id is its index in `names`.

    Attributes:
        names: the names of the tasks.
        train: the examples to train on.
        test: the examples to score on.
        dev: examples off the training split, to choose options on.
        usage: task -> split -> the usage of its rows.
        notes: the notes of the Pools.
    """

    names: tuple[str, ...]
    train: Sequence[Example] = field(default_factory=list)
    test: list[Example] = field(default_factory=list)
    dev: list[Example] = field(default_factory=list)
    usage: dict[str, dict[str, Usage]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def ids(self) -> dict[str, int]:
        """Returns each task's id by its name."""
        return {name: i for i, name in enumerate(self.names)}

    def report(self) -> Iterator[str]:
        """Yields one line per task on the used and unused rows, then the notes."""
        for name in self.names[:_MAX_LINES]:
            yield f"{shown(name)[1:-1]}: " + ", ".join(f"{split} {usage}" for split, usage in self.usage[name].items())
        if len(self.names) > _MAX_LINES:
            yield f"... and {len(self.names) - _MAX_LINES:,} more tasks"
        yield from self.notes

    def counts(self) -> dict[str, Any]:
        """Returns the content of the report as a JSON-ready dictionary."""
        tasks = {name: {split: vars(usage) for split, usage in splits.items()} for name, splits in self.usage.items()}
        return {"tasks": tasks, "notes": list(self.notes)}


def read_tasks(
    data: Any, tasks: Sequence[str] = (), *, train: int | PerTask = 500, test: int = 500, dev: int = 0, seed: int = 0,
    ignore_columns: Collection[str] = (), columns: Iterable[str] | Mapping[str, str] = (),
) -> Pools:  # fmt: skip
    """Reads the examples of several tasks.

    Args:
        data: one source or a list of them; None: the built-in tasks. A source is a .jsonl, .json, .csv, .tsv, .txt
            (.gz too) or .parquet file, a folder of such files, or the id of a hub dataset ("owner/name", or
            "owner/name:configuration"), with "name=" before it to name it; or a mapping {path, name, split, columns,
            rows} (see data/named_source.py). The format of rows is in align_ext/data/rows.py. A folder's files, and
            files of one task, may be named after splits (x.train.jsonl, x.test.jsonl).
        tasks: names of the tasks to keep, all if empty; without data, any generators of reasoning-gym.
        train: how many training examples of a built-in task to generate.
        test: how many test examples of a built-in task to generate.
        dev: how many examples of a built-in task to generate for choosing options.
        seed: the seed of the generated training examples; nothing else depends on it.
        ignore_columns: columns of the rows to leave out.
        columns: texts "column=name" or a mapping, the name in the source of a column of a row, for sources without
            columns of their own.

    Raises:
        ValueError: no such data, two sources of one task, a row that cannot be used (the message names file and line),
            or an unknown task.
    """
    if data is None:
        names = tuple(tasks) if tasks else tuple(BUILTIN_TASKS)
        check_generators(names)
        store = ExampleStore()
        return Pools({name: generated(name, int(_of(train, name)), test, dev, seed, store) for name in names})
    store = ExampleStore()
    sources = [read_source(given, ignore_columns, store) for given in named_sources(data, columns)]
    found = _join(sources)
    if len(found) > _MAX_TASKS:
        raise ValueError(f"the data has {len(found):,} tasks, and there may be {_MAX_TASKS:,}")
    chosen = {name: found[name] for name in _choose_names(sorted(found), tasks)}
    for name, splits in chosen.items():
        if "" in splits and len(splits) > 1:
            where = {bool(split): examples[0].where for split, examples in splits.items()}
            raise ValueError(
                f"the task {shown(name)} has rows in a split ({where[True]}) and rows in none ({where[False]}): name "
                "all of its files after splits, as x.train.jsonl and x.test.jsonl, or none"
            )
    skipped, unused = [name for source in sources for name in source.skipped], Counter[str]()
    cut = [note for source in sources for note in source.cut]
    for source in sources:
        unused.update(source.unused)
    notes = [*cut, *([_shorten(f"not read: {', '.join(skipped)}")] if skipped else [])]
    if unused:
        lost = (f"{shown(name)[1:-1]} ({count:,} rows)" for name, count in sorted(unused.items()))
        notes.append(_shorten(f"unused columns: {', '.join(lost)}"))
    ordered = {n: {s: part.ordered(0) for s, part in splits.items()} for n, splits in chosen.items()}
    return Pools(ordered, tuple(notes), all(source.alone is not None for source in sources))


def _join(sources: Sequence[Source]) -> dict[str, dict[str, Examples]]:
    """Returns the examples of all sources by task and split.

    Of several files, the names say the splits of a task; a training file that is all there is of a task is undivided,
    and so is one split of a dataset.
    """
    found: dict[str, dict[str, Examples]] = {}
    origins: dict[str, list[tuple[str, Source]]] = {}
    for source in sources:
        own: dict[str, dict[str, Examples]] = {}
        for split, examples in source.splits.items():
            if source.alone is not None and len(sources) > 1:
                split = split_named(source.alone)
            for task, part in examples.by_task().items():
                own.setdefault(task, {})[split] = part
        for task, splits in own.items():
            for split, examples in splits.items():
                for other, earlier in origins.setdefault(task, []):
                    if other == split and earlier is not source:
                        raise ValueError(
                            f"the task {shown(task)} is in {shown(earlier.given.path)} and in "
                            f"{shown(source.given.path)}: name one of them, as --data other={source.given.path}, or "
                            "let their names say their splits (x.train.jsonl, x.test.jsonl)"
                        )
                origins[task].append((split, source))
                found.setdefault(task, {})[split] = examples
    for task, ((split, source), *others) in origins.items():
        if split == "train" and source.alone is not None and not others:
            found[task] = {"": found[task][split]}
    return found


def _of(number: int | PerTask, task: str) -> float:
    return number.of(task) if isinstance(number, PerTask) else number


def select(
    pools: Pools, train_per_task: int | PerTask, test_per_task: int,
    fits: Callable[[Example], bool] = lambda _: True, *, dev_per_task: int = 0, seed: int = 0,
    seq_len: int | None = None,
) -> TaskData:  # fmt: skip
    """Selects fitting examples of each task; prompts of test and dev examples are never trained on.

    The scored examples are the same for every seed, so that runs of several seeds can be compared row by row.

    Args:
        pools: the result of read_tasks; the first examples of an undivided pool are scored, the others are trained on.
        train_per_task: the most training examples of each task.
        test_per_task: the most test examples of each task.
        fits: whether an example can be used.
        dev_per_task: the most examples of each task that are held out of the training split, to choose options on.
        seed: the seed of the choice and the order of the training examples.
        seq_len: the most tokens of an example that fits, for messages.

    Raises:
        ValueError: a task has nothing to train or to score on.
    """
    chosen = functools.partial(_select, fits=fits, seq_len=seq_len)
    result = TaskData(tuple(pools.tasks), notes=pools.notes)
    train_parts: list[Examples] = []
    few: list[str] = []
    for name, splits in pools.tasks.items():
        split, pool = _test_split(splits) or ("test", splits.get("", _NONE))
        tested, scored = chosen(pool, test_per_task, f"{shown(name)} has no examples to score", "eval_examples")
        train = splits.get("train")
        if train is None and split in splits:
            raise ValueError(
                f"the task {shown(name)} has rows of the split {split} alone ({pool[0].where}): add a file to train "
                "on, as x.train.jsonl, or let its name say no split: some rows are then kept apart to score on"
            )
        if train is None and len(pool) <= len(tested):
            raise ValueError(
                f"the task {shown(name)} has no examples to train on: all of its {len(pool)} are kept apart to score "
                "on: lower eval_examples, or add rows"
            )
        prompts = {_asked_id(example) for example in (tested if train is None else pool)}
        if dev_per_task:
            task = f"{shown(name)} has no examples to choose on"
            dev, result.usage.setdefault(name, {})["dev"] = chosen(
                splits.get(DEV) or train or pool, dev_per_task, task, "dev", prompts
            )
            prompts |= {_asked_id(example) for example in dev}
            result.dev.extend(dev)
        order, most = (train or pool).ordered(seed), int(_of(train_per_task, name))
        trained, learnt = chosen(order, most, f"{shown(name)} has no examples to train", "train_examples", prompts)
        result.usage.setdefault(name, {}).update({"train": learnt, split: scored})
        _add_unused(result.usage[name], splits)
        if train is None and len(trained) < len(tested):
            few.append(f"{shown(name)[1:-1]} {len(trained)} and {len(tested)}")
        train_parts.append(trained)
        result.test.extend(tested)
    first, *others = train_parts
    note = "tasks with fewer training rows than held-out rows (lower eval_examples)"
    notes = [_shorten(f"{note}: {', '.join(few)}")] if few else []
    return replace(result, train=first.joined(others), notes=(*result.notes, *notes))


def row_ids(examples: Sequence[Example]) -> list[str]:
    """Returns an id for each example: its task and 48 bits of the SHA-256 of what is asked and answered.

    The id depends on the row's content alone, so that the rows of two runs can be paired; the k-th copy of a row gets
    "#k" behind it.
    """
    seen: Counter[str] = Counter()
    ids = []
    for x in examples:
        parts = (x.prompt, x.answer, x.choices, x.label, x.also, *([x.calls] if x.calls else []))
        content = repr(parts).encode("utf-8", "surrogatepass")
        name = f"{x.task}/{hashlib.sha256(content).hexdigest()[:12]}"
        seen[name] += 1
        ids.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return ids


def scored_examples(
    pools: Pools, most: int, fits: Callable[[Example], bool], *, undivided: bool, seq_len: int | None = None
) -> TaskData:
    """Selects the first fitting examples of each task's test split, or else of its validation split.

    Args:
        pools: the result of read_tasks.
        most: the most examples of each task.
        fits: whether an example can be used.
        undivided: whether examples without a split are scored too.
        seq_len: as in select.

    Raises:
        ValueError: a task has nothing to score on.
    """
    result = TaskData(tuple(pools.tasks), notes=pools.notes)
    for name, splits in pools.tasks.items():
        split, pool = _test_split(splits) or ("test", splits.get("", _NONE) if undivided else _NONE)
        if not pool:
            raise ValueError(
                f"the task {shown(name)} has no test split: name a file of examples to score on with --data"
            )
        task = f"{shown(name)} has no examples to score"
        tested, used = _select(pool, most, task, "examples", fits=fits, seq_len=seq_len)
        result.usage[name] = {split: used}
        _add_unused(result.usage[name], splits)
        result.test.extend(tested)
    return result


def _test_split(splits: Mapping[str, Examples]) -> tuple[str, Examples] | None:
    """Returns the name and the examples of the split to score on, or None."""
    return next(((split, splits[split]) for split in ("test", "validation") if split in splits), None)


def _add_unused(usage: dict[str, Usage], splits: Mapping[str, Examples]) -> None:
    """Adds the usage of splits that are not used at all."""
    for split in splits:
        if split and split not in usage:
            rows = len(splits[split])
            usage[split] = Usage(rows, 0, {"in an unused split": rows}, 0)


def _select(
    pool: Examples, most: int, task: str, option: str, tested: Collection[bytes] = (), *,
    fits: Callable[[Example], bool], seq_len: int | None,
) -> tuple[Examples, Usage]:  # fmt: skip
    """Selects the first fitting examples of a pool without tested prompts (the ids of their texts).

    Also returns the usage of the pool.
    """
    selected: list[int] = []
    too_long = rest = 0
    for position, example in enumerate(pool):
        if tested and _asked_id(example) in tested:
            continue
        rest += 1
        if len(selected) == most:
            continue
        if fits(example):
            selected.append(position)
        else:
            too_long += 1
    if not selected:
        why = f": all {too_long} are too long" if too_long else ": all have held-out prompts" * bool(pool)
        why += f" for seq_len={seq_len}: give a larger one" if too_long and seq_len is not None else ""
        raise ValueError(f"the task {task} on{why}")
    counts = {
        f"beyond {option}": rest - len(selected) - too_long,
        "too long (seq_len)": too_long,
        "with a held-out prompt": len(pool) - rest,
    }
    left_out = {reason: count for reason, count in counts.items() if count}
    return pool.at(selected), Usage(len(pool), len(selected), left_out, pool.repeated())


def _asked_id(example: Example) -> bytes:
    return hashlib.blake2b(example.asked.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _choose_names(found: Sequence[str], wanted: Sequence[str]) -> tuple[str, ...]:
    for name in wanted:
        if name not in found:
            raise ValueError(unknown_name("task", name, found))
    return tuple(name for name in found if not wanted or name in wanted)


def _shorten(line: str) -> str:
    return line if len(line) <= _MAX_NOTE else line[:_MAX_NOTE] + " ..."
