"""Keeps each example's task beside the tensors that a batch usually holds."""

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

Collator = Callable[[list[dict[str, Any]]], Any]
NO_TASK = -1


class TaskCollator:
    """Collates features by another collator and adds their `task_ids`.

    int64 [B] where each feature has one id; [B, S], -1 on padding, where features have one for each token (packed
    rows) or the inner collator lets all features follow each other in one row (padding-free batches).

    Args:
        inner: any collator of features, which never sees `task_ids`; or a tokenizer, with which input_ids,
            attention_mask and labels (by -100) are padded to the longest of the batch.
        required: whether features without task_ids are an error; otherwise they make a batch without.
    """

    def __init__(self, inner: Collator | PreTrainedTokenizerBase, *, required: bool = True) -> None:
        if isinstance(inner, PreTrainedTokenizerBase):
            # In spite of its name the collator that pads labels for any model; it builds no decoder inputs by itself.
            if "attention_mask" not in inner.model_input_names:  # or it would pad none
                inner = copy.copy(inner)
                inner.model_input_names = [*inner.model_input_names, "attention_mask"]
            inner = DataCollatorForSeq2Seq(inner, padding=True, label_pad_token_id=-100)
        self.inner, self.required = inner, required

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Collates a batch.

        Args:
            features: each with `task_ids` beside what the inner collator takes: an integer, or one for each of its
                input_ids (-1: no task).

        Returns:
            The inner collator's batch with task_ids, int64 [B] or [B, S].

        Raises:
            ValueError: a feature has no task_ids, or neither one nor one for each token.
        """
        if not self.required and not any("task_ids" in feature for feature in features):
            return self.inner([dict(feature) for feature in features])
        ids = [_tasks_of(feature) for feature in features]
        batch = self.inner([{k: v for k, v in feature.items() if k != "task_ids"} for feature in features])
        per_token = any(isinstance(tasks, list) for tasks in ids)
        flattened = "input_ids" in batch and len(batch["input_ids"]) != len(features)
        if per_token or flattened:
            rows = [spread(tasks, len(f["input_ids"])) for tasks, f in zip(ids, features, strict=True)]
            batch["task_ids"] = _padded([list(chain(*rows))] if flattened else rows, batch)
        else:
            batch["task_ids"] = torch.tensor(ids, dtype=torch.int64)
        return batch


def spread(tasks: int | list[int], tokens: int) -> list[int]:
    """One id for each token: those given, or the example's for all."""
    return tasks if isinstance(tasks, list) else [tasks] * tokens


def _tasks_of(feature: Mapping[str, Any]) -> int | list[int]:
    if "task_ids" not in feature:
        raise ValueError(
            f"a feature has no task_ids (it has {', '.join(sorted(feature)) or 'nothing'}): give the dataset an "
            "integer column task_ids, and train with AlignTrainer, or with remove_unused_columns=False, since "
            "Trainer drops columns that the model's forward does not name"
        )
    given = feature["task_ids"]
    try:
        if isinstance(given, (list, tuple)) or (isinstance(given, Tensor) and given.dim() == 1):
            tokens = len(feature.get("input_ids", ()))
            if len(given) != tokens:
                raise ValueError(f"task_ids must be one integer per example or per token, got {len(given)} for the "
                                 f"{tokens} tokens of an example: truncate them alike, or give one")  # fmt: skip
            return [operator.index(task) for task in given]
        return operator.index(given)
    except TypeError:
        raise ValueError(f"task_ids must be one integer per example or per token, got {given!r}") from None


def _padded(rows: list[list[int]], batch: Mapping[str, Any]) -> Tensor:
    """The rows as int64 of the shape of input_ids [B, S], padded by -1 on the side where attention_mask is."""
    ids = torch.full(tuple(batch["input_ids"].shape), NO_TASK, dtype=torch.int64)
    mask = batch.get("attention_mask")
    left = mask is not None and bool((mask[:, 0] == 0).any())
    for i, row in enumerate(rows):
        start = ids.shape[1] - len(row) if left else 0
        ids[i, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
    return ids
