"""Multi-task LoRA training: fused adapters and alignment losses with exact gradients. See README.md."""

from align_ext.system import starting  # noqa: F401  first, so that signals are handled during the other imports

# isort: split
from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from align_ext.ops import _native  # noqa: F401  without the operators nothing works, and its error says what to do

if TYPE_CHECKING:
    from align_ext.adapters.capture import capture_latents
    from align_ext.alignment.accumulation import align_statistics
    from align_ext.alignment.context import align_parts, align_step, set_task
    from align_ext.alignment.loss_report import LossReport
    from align_ext.config import AlignLoraConfig
    from align_ext.io.save_adapter import export_peft, save_adapter
    from align_ext.merging.named import add_weighted_adapter, join_adapters
    from align_ext.model.cost import FlopsPerToken, ParameterCount, count_parameters, flops_per_token, match_rank
    from align_ext.model.disable import disable_adapter
    from align_ext.model.load_adapter import load_adapter
    from align_ext.model.merge import merge_and_unload, unload
    from align_ext.model.named import adapter_names, add_adapter, delete_adapter, set_adapter
    from align_ext.model.rank_allocation import allocated_ranks, update_and_allocate
    from align_ext.model.replace import adapter_report, replace_linear_with_align_lora
    from align_ext.ops._backend import backend

__all__ = [
    "AlignLoraConfig",
    "AlignMixin",
    "AlignSFTTrainer",
    "AlignTrainer",
    "FlopsPerToken",
    "LossReport",
    "ParameterCount",
    "TaskCollator",
    "TaskSampler",
    "adapter_names",
    "adapter_report",
    "add_adapter",
    "add_weighted_adapter",
    "align_parts",
    "align_statistics",
    "align_step",
    "allocated_ranks",
    "backend",
    "capture_latents",
    "copy_heads",
    "count_parameters",
    "delete_adapter",
    "disable_adapter",
    "evaluate",
    "example_latents",
    "export_peft",
    "features",
    "flops_per_token",
    "gradient_bands",
    "gradient_cosines",
    "head_bands",
    "head_similarity",
    "join_adapters",
    "join_tasks",
    "latent_similarity",
    "load_adapter",
    "load_model",
    "lorahub",
    "match_rank",
    "mechanism",
    "merge_and_unload",
    "read_tasks",
    "record_adapters",
    "replace_linear_with_align_lora",
    "routing",
    "save_adapter",
    "select",
    "separation",
    "set_adapter",
    "set_task",
    "task_divergence",
    "tsne",
    "unload",
    "update_and_allocate",
]
__version__ = version("align_ext")


_LAZY = {  # imported on first use: the operators need torch alone, these names other libraries
    "AlignLoraConfig": "align_ext.config",
    "AlignMixin": "align_ext.training.trainer",
    "AlignSFTTrainer": "align_ext.training.sft_trainer",
    "AlignTrainer": "align_ext.training.trainer",
    "FlopsPerToken": "align_ext.model.cost",
    "LossReport": "align_ext.alignment.loss_report",
    "ParameterCount": "align_ext.model.cost",
    "TaskCollator": "align_ext.data.collator",
    "TaskSampler": "align_ext.data.task_sampler",
    "adapter_names": "align_ext.model.named",
    "adapter_report": "align_ext.model.replace",
    "add_adapter": "align_ext.model.named",
    "add_weighted_adapter": "align_ext.merging.named",
    "align_parts": "align_ext.alignment.context",
    "align_statistics": "align_ext.alignment.accumulation",
    "align_step": "align_ext.alignment.context",
    "allocated_ranks": "align_ext.model.rank_allocation",
    "backend": "align_ext.ops._backend",
    "capture_latents": "align_ext.adapters.capture",
    "copy_heads": "align_ext.diagnostics.heads",
    "count_parameters": "align_ext.model.cost",
    "delete_adapter": "align_ext.model.named",
    "disable_adapter": "align_ext.model.disable",
    "evaluate": "align_ext.evaluation.evaluate",
    "example_latents": "align_ext.diagnostics.latents",
    "export_peft": "align_ext.io.save_adapter",
    "features": "align_ext.data.encode",
    "flops_per_token": "align_ext.model.cost",
    "gradient_bands": "align_ext.diagnostics.bands",
    "gradient_cosines": "align_ext.diagnostics.conflict",
    "head_bands": "align_ext.diagnostics.bands",
    "head_similarity": "align_ext.diagnostics.heads",
    "join_adapters": "align_ext.merging.named",
    "join_tasks": "align_ext.data.join_tasks",
    "latent_similarity": "align_ext.diagnostics.latents",
    "load_adapter": "align_ext.model.load_adapter",
    "load_model": "align_ext.base_model.load",
    "lorahub": "align_ext.merging.lorahub",
    "match_rank": "align_ext.model.cost",
    "mechanism": "align_ext.study.mechanism",
    "merge_and_unload": "align_ext.model.merge",
    "read_tasks": "align_ext.data.tasks",
    "record_adapters": "align_ext.diagnostics.record",
    "replace_linear_with_align_lora": "align_ext.model.replace",
    "routing": "align_ext.diagnostics.routing",
    "save_adapter": "align_ext.io.save_adapter",
    "select": "align_ext.data.tasks",
    "separation": "align_ext.diagnostics.separation",
    "set_adapter": "align_ext.model.named",
    "set_task": "align_ext.alignment.context",
    "task_divergence": "align_ext.diagnostics.latents",
    "tsne": "align_ext.diagnostics.separation",
    "unload": "align_ext.model.merge",
    "update_and_allocate": "align_ext.model.rank_allocation",
}


def __getattr__(name: str) -> Any:
    """Imports the names in _LAZY on first use."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'align_ext' has no attribute {name!r}")
