"""Collates batches with the task of each example or token."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

from align_ext.alignment.tokens import NO_TASK

Collator = Callable[[list[dict[str, Any]]], Any]


class TaskCollator:
    """Collates features by another collator and adds their `task_ids`.

    They are int64 [B] if each feature has one id; [B, S] with -1 on padding if features have one id per token (packed
    rows), or if the inner collator joins all features into one row (padding-free batches).

    Args:
        inner: a collator of features, which gets them without `task_ids`; or a tokenizer, to pad input_ids,
            attention_mask and labels (by -100) to the longest row of the batch.
        required: whether features without task_ids are an error; otherwise the batch has no task_ids.
    """

    def __init__(self, inner: Collator | PreTrainedTokenizerBase, *, required: bool = True) -> None:
        if isinstance(inner, PreTrainedTokenizerBase):
            # In spite of its name, this collator pads labels for any model; it builds no decoder inputs by itself.
            if "attention_mask" not in inner.model_input_names:  # otherwise it would make no mask
                inner = copy.copy(inner)
                inner.model_input_names = [*inner.model_input_names, "attention_mask"]
            inner = DataCollatorForSeq2Seq(inner, padding=True, label_pad_token_id=-100)
        self.inner, self.required = inner, required

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Collates a batch.

        Args:
            features: the features for the inner collator, each with `task_ids`: an integer, or one integer for each of
                its input_ids (-1: no task).

        Returns:
            The inner collator's batch with task_ids, int64 [B] or [B, S].

        Raises:
            ValueError: a feature has no task_ids, or they are neither one integer nor one per token.
        """
        if not self.required and not any("task_ids" in feature for feature in features):
            return self.inner([dict(feature) for feature in features])
        ids = [_tasks_of(feature) for feature in features]
        batch = self.inner([{k: v for k, v in feature.items() if k != "task_ids"} for feature in features])
        per_token = any(isinstance(tasks, list) for tasks in ids)
        flattened = "input_ids" in batch and len(batch["input_ids"]) != len(features)
        if per_token or flattened:
            rows = [ids_per_token(tasks, len(f["input_ids"])) for tasks, f in zip(ids, features, strict=True)]
            batch["task_ids"] = _pad_rows([list(chain(*rows))] if flattened else rows, batch)
        else:
            batch["task_ids"] = torch.tensor(ids, dtype=torch.int64)
        return batch


def ids_per_token(tasks: int | list[int], tokens: int) -> list[int]:
    """Returns one id per token: the given ones, or the example's id for all."""
    return tasks if isinstance(tasks, list) else [tasks] * tokens


def _tasks_of(feature: Mapping[str, Any]) -> int | list[int]:
    if "task_ids" not in feature:
        raise ValueError(
            f"a feature has no task_ids (it has {', '.join(sorted(feature)) or 'nothing'}): give the dataset an "
            "integer column task_ids, and train with AlignTrainer, or with remove_unused_columns=False, since "
            "Trainer drops columns that the model's forward does not name"
        )
    task_ids = feature["task_ids"]
    try:
        if isinstance(task_ids, (list, tuple)) or (isinstance(task_ids, Tensor) and task_ids.dim() == 1):
            tokens = len(feature.get("input_ids", ()))
            if len(task_ids) != tokens:
                raise ValueError(f"task_ids must be one integer per example or per token, got {len(task_ids)} for the "
                                 f"{tokens} tokens of an example: truncate them alike, or give one")  # fmt: skip
            return [operator.index(task) for task in task_ids]
        return operator.index(task_ids)
    except TypeError:
        raise ValueError(f"task_ids must be one integer per example or per token, got {task_ids!r}") from None


def _pad_rows(rows: list[list[int]], batch: Mapping[str, Any]) -> Tensor:
    """Returns the rows as int64 [B, S], the shape of input_ids, padded by -1 on the same side as attention_mask."""
    ids = torch.full(tuple(batch["input_ids"].shape), NO_TASK, dtype=torch.int64)
    mask = batch.get("attention_mask")
    left = mask is not None and bool((mask[:, 0] == 0).any())
    for i, row in enumerate(rows):
        start = ids.shape[1] - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids
