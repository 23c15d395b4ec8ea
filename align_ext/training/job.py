"""The inputs of a training job."""

from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from align_ext.data.tasks import TaskData
from align_ext.training.options import TrainOptions
from align_ext.training.run_folder import RunFolder


@dataclass
class Job:
    """Everything that a run needs; the options and the data have been checked."""

    options: TrainOptions
    folder: RunFolder
    data: TaskData
    model: Any
    tokenizer: Any
    device: str
    arguments: Any  # TrainingArguments
    train_rows: Dataset
    test_rows: list[dict[str, Any]]
    dev_rows: list[dict[str, Any]]  # to evaluate on during the training, if the best adapter is chosen
    digest: str  # SHA-256 of the examples
    mixed_by: list[int] | None = None  # the task of each training example to mix by; None: its own
