"""TRL's SFTTrainer with task ids: they survive its dataset preparation, packing and padding-free batches."""

from __future__ import annotations

import copy
from typing import Any

import torch
import trl
from datasets import Dataset
from torch import nn

from align_ext.hf.mixing import padded_token_tasks
from align_ext.hf.trainer import AlignMixin


class AlignSFTTrainer(AlignMixin, trl.SFTTrainer):
    """Trains a model adapted by replace_linear_with_align_lora on a dataset with a column `task_ids`.

    All of SFTTrainer's ways to prepare data work: text, prompt and completion, conversations, tokenised rows; packing
    ("bfd", "bfd_split", "wrapped") and padding-free batches, whose tokens keep the tasks of the examples they are from.

    Args:
        *args: as for trl.SFTTrainer.
        task_names: as for AlignTrainer, like the other arguments that it adds.
        **kwargs: as for trl.SFTTrainer.

    Raises:
        ValueError: a dataset without the column task_ids while alignment is on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.data_collator: Any = TokenTaskCollator(self.data_collator)

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, packing: bool, *rest: Any) -> Any:
        """TRL's preparation without packing, then the tasks of the tokens, then TRL's packing of all columns."""
        first = dataset if isinstance(dataset, Dataset) else next(iter(dataset.take(1)))
        if "task_ids" not in (first.column_names if isinstance(first, Dataset) else first):
            return super()._prepare_dataset(dataset, processing_class, args, packing, *rest)
        unpacked = args
        if packing and args.packing_strategy != "bfd":  # which alone leaves out what exceeds max_length
            unpacked = copy.copy(args)
            unpacked.max_length = None
        dataset = super()._prepare_dataset(dataset, processing_class, unpacked, False, *rest)
        dataset = dataset.map(_spread_tasks)
        if packing:
            dataset = trl.pack_dataset(
                dataset.select_columns(["input_ids", "labels", "task_ids"]), args.max_length, args.packing_strategy
            )
        return dataset

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any, *, wanted: bool
    ) -> tuple[torch.Tensor, Any]:
        """TRL's loss; the outputs of its forward as they pass by, since asking for them costs a second forward."""
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output)) if wanted else None
        try:
            loss = trl.SFTTrainer.compute_loss(self, model, inputs, num_items_in_batch=num_items_in_batch)
        finally:
            if handle is not None:
                handle.remove()
        return loss, seen[0] if seen else None


class TokenTaskCollator:
    """Collates by another collator and adds task_ids [B, S], -1 on padding, from each example's list of them."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, features: list[dict[str, Any]]) -> Any:
        """Collates a batch; features without task_ids make a batch without."""
        batch = self.inner([{k: v for k, v in feature.items() if k != "task_ids"} for feature in features])
        if all("task_ids" in feature for feature in features):
            batch["task_ids"] = padded_token_tasks([f["task_ids"] for f in features], batch["input_ids"].shape)
        return batch

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["inner"], name)


def _spread_tasks(example: dict[str, Any]) -> dict[str, Any]:
    """One id for each token in place of one for the example."""
    task = example["task_ids"]
    return {"task_ids": task if isinstance(task, list) else [task] * len(example["input_ids"])}
