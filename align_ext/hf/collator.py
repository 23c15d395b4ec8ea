"""Keeps each example's task beside the tensors that a batch usually holds."""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase

Collator = Callable[[list[dict[str, Any]]], Any]


class TaskCollator:
    """Collates features by another collator and adds their `task_ids` as int64 [B].

    Args:
        inner: any collator of features, which never sees `task_ids`; or a tokenizer, with which input_ids,
            attention_mask and labels (by -100) are padded to the longest of the batch.
    """

    def __init__(self, inner: Collator | PreTrainedTokenizerBase) -> None:
        if isinstance(inner, PreTrainedTokenizerBase):
            # In spite of its name the collator that pads labels for any model; it builds no decoder inputs by itself.
            inner = DataCollatorForSeq2Seq(inner, padding=True, label_pad_token_id=-100)
        self.inner = inner

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> Any:
        """Collates a batch.

        Args:
            features: each with an integer `task_ids` (-1: no task) beside what the inner collator takes.

        Returns:
            The inner collator's batch with task_ids, int64 [B].

        Raises:
            ValueError: a feature has no task_ids, or more than one.
        """
        ids = [self._task_of(feature) for feature in features]
        batch = self.inner([{k: v for k, v in feature.items() if k != "task_ids"} for feature in features])
        batch["task_ids"] = torch.tensor(ids, dtype=torch.int64)
        return batch

    @staticmethod
    def _task_of(feature: Mapping[str, Any]) -> int:
        if "task_ids" not in feature:
            raise ValueError(
                f"a feature has no task_ids (it has {', '.join(sorted(feature)) or 'nothing'}): give the dataset an "
                "integer column task_ids, and train with AlignTrainer, or with remove_unused_columns=False, since "
                "Trainer drops columns that the model's forward does not name"
            )
        try:
            return operator.index(feature["task_ids"])
        except TypeError:
            raise ValueError(f"task_ids must be one integer per example, got {feature['task_ids']!r}") from None
