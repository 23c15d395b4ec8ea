"""Multi-task LoRA training: fused adapters and alignment losses with exact gradients. Start: README.md."""

from importlib.metadata import version
from typing import Any

from align_ext.batch import AlignParts
from align_ext.config import AlignLoraConfig
from align_ext.diagnostics.backend import backend
from align_ext.hf.export import load_adapter, merge_and_unload, save_adapter, unload
from align_ext.hf.replace import adapter_report, replace_linear_with_align_lora
from align_ext.step import align_parts, align_step, set_task

__all__ = [
    "AlignLoraConfig",
    "AlignParts",
    "AlignTrainer",
    "TaskCollator",
    "adapter_report",
    "align_parts",
    "align_step",
    "backend",
    "load_adapter",
    "merge_and_unload",
    "replace_linear_with_align_lora",
    "save_adapter",
    "set_task",
    "unload",
]
__version__ = version("align_ext")


def __getattr__(name: str) -> Any:
    """AlignTrainer and TaskCollator import transformers; everything else does without."""
    if name == "AlignTrainer":
        from align_ext.hf.trainer import AlignTrainer

        return AlignTrainer
    if name == "TaskCollator":
        from align_ext.hf.collator import TaskCollator

        return TaskCollator
    raise AttributeError(f"module 'align_ext' has no attribute {name!r}")
