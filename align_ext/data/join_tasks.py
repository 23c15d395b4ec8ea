"""Datasets of one task each, joined into one with the column task_ids."""

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import datasets

from align_ext.system.messages import shown


def join_tasks(parts: Mapping[str, Any], *, per_task: int = 2) -> tuple[Any, tuple[str, ...]]:
    """Joins one dataset per task into one dataset with a column task_ids.

    Args:
        parts: task name -> datasets.Dataset, or all of them datasets.IterableDataset, with the same columns.
        per_task: for iterable datasets, how many examples of a task come in a row, so that a batch whose size is a
            multiple of it has at least so many of each of its tasks.

    Returns:
        The joined dataset, whose task_ids are the indices of the names, and the names. Order datasets of known size by
        a TaskSampler. Iterable datasets take turns with per_task examples each; one that ends starts again until all
        have ended, so that all tasks come equally often. The result can be resumed by state_dict and load_state_dict.

    Raises:
        ValueError: no datasets, datasets of both kinds, splits instead of tasks, or per_task below 1.
    """
    if not parts or {"train", "test"} & set(parts):
        raise ValueError(f"parts must have a dataset for each task, got {list(parts)}: of splits take one, ['train']")
    iterable = {isinstance(part, datasets.IterableDataset) for part in parts.values()}
    if len(iterable) > 1:
        raise ValueError("parts holds datasets.Dataset and datasets.IterableDataset: make them all of one kind")
    if per_task < 1:
        raise ValueError(f"per_task must be at least 1, got {per_task}")
    numbered = [with_task(part, number) for number, part in enumerate(parts.values())]
    if iterable == {False}:
        return datasets.concatenate_datasets(numbered), tuple(parts)
    groups = [part.batch(per_task, drop_last_batch=True) for part in numbered]
    turns = datasets.interleave_datasets(groups, stopping_strategy="all_exhausted")
    return turns.map(_flatten, batched=True, batch_size=1), tuple(parts)


def with_task(dataset: Any, task: int) -> Any:
    """Returns a dataset with a column task_ids that holds one number."""
    if isinstance(dataset, datasets.IterableDataset):
        return dataset.map(_add_task, fn_kwargs={"task": task})
    return dataset.add_column("task_ids", [task] * len(dataset))


def add_task_ids(eval_dataset: Any, names: Sequence[str]) -> Any:
    """Adds the column task_ids to evaluation datasets by task name that lack it."""
    if not isinstance(eval_dataset, Mapping) or not set(eval_dataset) <= set(names):
        return eval_dataset
    return {
        name: part if "task_ids" in (part.column_names or ()) else with_task(part, names.index(name))
        for name, part in eval_dataset.items()
    }


def example_tasks(dataset: Any) -> list[int]:
    """Returns the task of each example of a training dataset.

    Raises:
        ValueError: there is no column task_ids, or rows hold several tasks (packed rows).
    """
    columns = getattr(dataset, "column_names", None)
    if columns is None and len(dataset):
        columns = dataset[0]
    if "task_ids" not in (columns or ()):
        raise ValueError("mixing needs a training dataset with a column task_ids (join_tasks makes one)")
    column = dataset["task_ids"] if hasattr(dataset, "column_names") else [row["task_ids"] for row in dataset]
    return [_only_task(tasks) for tasks in column]


def _only_task(tasks: Any) -> int:
    if not isinstance(tasks, list):
        return task_number(tasks)
    found = set(map(task_number, tasks)) - {-1} or {-1}
    if len(found) > 1:
        raise ValueError(
            "mixing orders examples, but rows are packed from several tasks: use packing=False or no mixing"
        )
    return found.pop()


def task_number(task: Any) -> int:
    """Returns a task id as an int.

    Raises:
        ValueError: it is no integer of Python, NumPy or torch, or is below -1.
    """
    try:
        number = operator.index(task)
    except (TypeError, RuntimeError):  # torch raises RuntimeError
        number = -2
    if isinstance(task, bool) or number < -1:
        raise ValueError(f"task_ids must be integers, -1 for none, got {shown(task)}")
    return number


def _add_task(example: dict[str, Any], task: int) -> dict[str, Any]:
    return {**example, "task_ids": task}


def _flatten(groups: dict[str, list[list[Any]]]) -> dict[str, list[Any]]:
    """Returns the examples of a batch of groups."""
    return {name: [value for group in column for value in group] for name, column in groups.items()}
