"""The TrainingArguments of the Align-LoRA paper."""

from typing import Any

import torch
from transformers import TrainingArguments

from align_ext.base_model.dtypes import best_dtype


def align_training_arguments(output_dir: str, **overrides: Any) -> TrainingArguments:
    """Returns TrainingArguments with the recipe of the Align-LoRA paper: 2e-4, cosine, warm-up over 3%, bfloat16.

    bf16 is on where a GPU multiplies in bfloat16, if neither fp16 nor bf16 is given. It is off on CPUs, many of which
    are slower in it.

    Args:
        output_dir: as in TrainingArguments.
        **overrides: other fields of TrainingArguments.
    """
    recipe: dict[str, Any] = {
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 0.03,  # a fraction of all steps, since it is below 1
        "report_to": "none",
        "bf16": not (overrides.get("use_cpu") or overrides.get("fp16")) and has_bfloat16(),
    }
    return TrainingArguments(output_dir=output_dir, **{**recipe, **overrides})


def has_bfloat16() -> bool:
    """Whether there is a GPU that multiplies in bfloat16."""
    return torch.cuda.is_available() and best_dtype("cuda") == torch.bfloat16
