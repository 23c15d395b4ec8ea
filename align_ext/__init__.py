"""Multi-task LoRA training: fused adapters and alignment losses with exact gradients. Start: README.md."""

from importlib import import_module
from importlib.metadata import version
from typing import Any

from align_ext import starting  # noqa: F401  first: it listens to signals while the others are imported
from align_ext.adapters.capture import capture_latents
from align_ext.alignment.accumulation import align_statistics
from align_ext.alignment.context import align_parts, align_step, set_task
from align_ext.alignment.loss_report import AlignParts
from align_ext.budget import FlopsPerToken, ParameterCount, count_parameters, flops_per_token, match_rank
from align_ext.config import AlignLoraConfig
from align_ext.diagnostics.backend import backend
from align_ext.hf.export import export_peft, save_adapter
from align_ext.hf.load import load_adapter
from align_ext.hf.merge import merge_and_unload, unload
from align_ext.hf.replace import adapter_report, replace_linear_with_align_lora

__all__ = [
    "AlignLoraConfig",
    "AlignParts",
    "AlignSFTTrainer",
    "AlignTrainer",
    "FlopsPerToken",
    "ParameterCount",
    "TaskCollator",
    "TaskSampler",
    "adapter_report",
    "align_parts",
    "align_statistics",
    "align_step",
    "backend",
    "capture_latents",
    "count_parameters",
    "export_peft",
    "flops_per_token",
    "join_tasks",
    "load_adapter",
    "match_rank",
    "merge_and_unload",
    "replace_linear_with_align_lora",
    "save_adapter",
    "set_task",
    "unload",
]
__version__ = version("align_ext")


_LAZY = {  # these import transformers, datasets or trl; everything else does without
    "AlignSFTTrainer": "align_ext.hf.sft",
    "AlignTrainer": "align_ext.hf.trainer",
    "TaskCollator": "align_ext.hf.collator",
    "TaskSampler": "align_ext.hf.mixing",
    "join_tasks": "align_ext.hf.mixing",
}


def __getattr__(name: str) -> Any:
    """Imports what needs more than torch when it is asked for."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'align_ext' has no attribute {name!r}")
