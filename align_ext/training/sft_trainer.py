"""TRL's SFTTrainer with task ids, also with its dataset preparation, packing and padding-free batches."""

import copy
from collections.abc import Callable
from typing import Any

import trl
from datasets import Dataset
from torch import Tensor, nn
from trl.data_utils import get_dataset_column_names

from align_ext.data.collator import TaskCollator, ids_per_token
from align_ext.training.trainer import AlignMixin


class AlignSFTTrainer(AlignMixin, trl.SFTTrainer):
    """Trains a model adapted by replace_linear_with_align_lora on a dataset with a column `task_ids`: TRL's SFTTrainer.

    It supports all data formats of SFTTrainer (text, prompt and completion, conversations, tokenised rows), packing
    ("bfd", "bfd_split", "wrapped") and padding-free batches; each token keeps the task of its example. The rows are the
    same as those of SFTTrainer, token for token.

    Args:
        *args: as in trl.SFTTrainer; a data_collator need not be a TaskCollator.
        **kwargs: as in trl.SFTTrainer and AlignTrainer.

    Raises:
        ValueError: in training, a dataset without the column task_ids while alignment is on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(self.data_collator, TaskCollator):
            self.data_collator: Any = TaskCollator(self.data_collator, required=False)

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        super()._reject_skip_prepare_without_labels(datasets, getattr(data_collator, "inner", data_collator))

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Callable | None,
        dataset_name: str,
    ) -> Any:  # fmt: skip
        """Prepares the dataset as TRL does; for packing, adds the task of each token before TRL packs the rows."""
        prepare = super()._prepare_dataset
        if not packing or args.max_length is None or "task_ids" not in get_dataset_column_names(dataset):
            return prepare(dataset, processing_class, args, packing, formatting_func, dataset_name)
        unlimited = copy.copy(args)
        unlimited.max_length = None  # packing truncates rows that are too long
        dataset = prepare(dataset, processing_class, unlimited, False, formatting_func, dataset_name)
        options = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
        dataset = dataset.map(_spread_tasks, **options).select_columns(["input_ids", "labels", "task_ids"])
        dataset = trl.pack_dataset(dataset, args.max_length, args.packing_strategy, options)
        return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any, *, return_outputs: bool, by_task: bool
    ) -> tuple[Tensor, Any, Any]:
        """Returns TRL's loss, and the outputs of its first forward from a hook, which avoids a second forward."""
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, output: seen.append(output)) if by_task else None
        try:
            result: Any = trl.SFTTrainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        finally:
            if handle is not None:
                handle.remove()
        loss, outputs = result if return_outputs else (result, None)
        return loss, outputs, seen[0] if seen else None


def _spread_tasks(example: dict[str, Any]) -> dict[str, Any]:
    """Returns one id per token instead of one id for the example."""
    return {"task_ids": ids_per_token(example["task_ids"], len(example["input_ids"]))}
