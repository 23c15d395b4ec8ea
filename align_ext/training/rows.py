"""The rows of a training job: read, selected, cut, tokenised and packed as its options say."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from datasets import Dataset

from align_ext.data.encode import features, fits
from align_ext.data.on_disk import Examples, ExampleStore, rows_on_disk
from align_ext.data.packing import cut_texts, pack
from align_ext.data.rows import Example
from align_ext.data.task_sampler import TaskSampler
from align_ext.data.tasks import Pools, TaskData, read_tasks, select
from align_ext.system.messages import shown
from align_ext.training.options import TrainOptions

_FAR = 0.05  # a difference of shares that a run tells


def read_pools(options: TrainOptions, dev: int = 0) -> Pools:
    """Reads all examples of the tasks.

    Args:
        options: the options of the job.
        dev: how many examples of a built-in task to generate for choosing options.

    Raises:
        ValueError: as in read_tasks; or an option names a task that is not there.
    """
    pools = read_tasks(
        options.data, options.tasks, train=options.train_counts, test=options.eval_examples, dev=dev,
        seed=options.order_seed, ignore_columns=options.ignore_columns, columns=options.columns,
    )  # fmt: skip
    options.train_counts.check(pools.tasks, "train_examples")
    options.weights.check(pools.tasks, "mixing_weights")
    return pools


def choose(
    options: TrainOptions, pools: Pools, tokenizer: Any | None, dev: int = 0,
    too_long: Callable[[Example], None] | None = None,
) -> TaskData:  # fmt: skip
    """Selects the examples to train and to score on; with packing, cuts plain texts that are too long, and notes it.

    Args:
        options: the options of the job.
        pools: the result of read_pools.
        tokenizer: the model's; None: lengths are not looked at.
        dev: at most so many examples of each task to hold out of the training split, to choose options on.
        too_long: is called with the examples that are left out for their length, as far as they were looked at.

    Raises:
        ValueError: as in select, encode or cut_texts.
    """

    def fit(example: Example) -> bool:
        fitting = tokenizer is None or fits(tokenizer, example, options.seq_len, cut=options.packing)
        if not fitting and too_long is not None:
            too_long(example)
        return fitting

    data = select(
        pools, options.train_counts, options.eval_examples, fit, dev_per_task=dev, seed=options.order_seed,
        seq_len=options.seq_len,
    )  # fmt: skip
    if tokenizer is None or not options.packing:
        return data

    def cut(examples: Sequence[Example]) -> Iterator[Example]:
        return cut_texts(tokenizer, examples, options.seq_len)

    parts: dict[str, Any] = {
        "train": Examples(ExampleStore()).add(cut(data.train)), "test": list(cut(data.test)), "dev": list(cut(data.dev))
    }  # fmt: skip
    notes = [
        f"{split}: {len(getattr(data, split)):,} examples were cut into {len(part):,} pieces of at most "
        f"{options.seq_len:,} tokens"
        for split, part in parts.items()
        if len(part) > len(getattr(data, split))
    ]
    return replace(data, **parts, notes=(*data.notes, *notes))


def train_rows(options: TrainOptions, tokenizer: Any, data: TaskData, *, packing: bool | None = None) -> Dataset:
    """Returns the rows to train on, packed or not as the options or `packing` say."""
    rows = rows_on_disk(features(tokenizer, data.train, data.ids(), options.trained_turns))
    packed = options.packing if packing is None else packing
    return rows_on_disk(pack(rows, options.seq_len)) if packed else rows


def encoded_rows(tokenizer: Any, data: TaskData, examples: Sequence[Example]) -> list[dict[str, Any]]:
    """Returns the rows of examples to score or to choose on, of which the answers alone count."""
    return list(features(tokenizer, examples, data.ids()))


def sampler_of(options: TrainOptions, data: TaskData, tasks: Sequence[int]) -> TaskSampler:
    """Returns the order in which a run takes its rows, of which `tasks` are the tasks."""
    arguments = batches(options, data, tasks)
    return TaskSampler(arguments.pop("tasks"), seed=options.order_seed, **arguments)


def mixing_note(options: TrainOptions, sampler: TaskSampler, names: Sequence[str]) -> str:
    """Returns a line on the task whose share of a run is furthest from what was asked, if that is far, or ""."""
    drawn, asked = sampler.drawn(), sampler.shares
    task = max(drawn, key=lambda task: abs(drawn[task] - asked[task]))
    if abs(drawn[task] - asked[task]) < _FAR:
        return ""
    why = "the run is too short for the turns of its tasks: more --steps come nearer"
    if options.mixing != "round_robin" and len(drawn) > 1:
        least = f"{sampler.per_task} rows of each or more"
        why = f"a micro-batch of {options.batch_size} holds two tasks or more, {least}: "
        why += "a larger --batch-size" + " or a smaller --per-task" * (sampler.per_task > 1) + " comes nearer"
    return f"{shown(names[task])} has {drawn[task]:.0%} of the run's rows, where {asked[task]:.0%} are asked: {why}"


def batches(options: TrainOptions, data: TaskData, tasks: Sequence[int]) -> dict[str, Any]:
    """Returns the arguments of the TaskSampler: one order of the rows for all architectures, with alignment or not.

    It is also the same for any number of processes, each of which takes its part of every batch. A batch that is too
    small for two tasks with per_task rows, which is possible without alignment only, holds fewer of each.

    Args:
        options: the options of the job.
        data: the examples.
        tasks: the task of each row to train on.
    """
    weights = {number: options.weights.of(name) for name, number in data.ids().items()}
    return {
        "mixing": options.mixing,
        "temperature": options.mixing_temperature,
        "per_task": min(options.per_task, max(1, options.batch_size // 2)),
        "batch_size": options.batch_size,
        "batches": options.steps * options.accumulation,  # one epoch, so that every step is complete
        "tasks": list(tasks),
        **({"weights": weights} if options.mixing_weights else {}),
    }
