"""What a training job works on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from align_ext.data.tasks import TaskData
from align_ext.training.options import TrainOptions
from align_ext.training.run_folder import RunFolder


@dataclass
class Job:
    """Everything a run needs, checked: what can be wrong with the options or the data is wrong before it exists."""

    options: TrainOptions
    folder: RunFolder
    data: TaskData
    model: Any
    tokenizer: Any
    device: str
    train_rows: list[dict[str, Any]]
    test_rows: list[dict[str, Any]]
