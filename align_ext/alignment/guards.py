"""Checks that refuse set-ups in which the alignment would be wrong: partial models, separate processes, and others."""

import os
import sys
from typing import Any

import torch.distributed as dist
from torch import nn

from align_ext.system.messages import shown


def refuse_compiled_autograd(*, ahead: bool = True) -> None:
    """Raises RuntimeError under compiled autograd, which cannot trace the Python that hands out a step's gradients.

    Args:
        ahead: whether to check also the option that turns it on for compiled models (this takes a microsecond).
    """
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled before this module is imported
    if dynamo is None:
        return
    autograd = dynamo.compiled_autograd
    on = autograd.compiled_autograd_enabled or autograd.in_compiled_autograd_region
    if on or (ahead and dynamo.config.compiled_autograd):
        raise RuntimeError(
            "compiled autograd cannot trace the backward of the adapters' losses: set "
            "torch._dynamo.config.compiled_autograd = False; torch.compile(model) compiles the layers' backward as well"
        )


def check_model(model: Any) -> None:
    """Raises ValueError if this is not a torch module."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {shown(model)}: load it first (from_pretrained)")


def refuse_parts_of_a_model(model: nn.Module) -> None:
    """Raises ValueError for pipeline stages and tensor parallelism; FSDP2 gathers its shards before a forward."""
    modules: list[Any] = list(model.modules()) if isinstance(model, nn.Module) else [model]
    kinds = {kind.__name__ for module in modules for kind in type(module).__mro__}
    if "_PipelineStageBase" in kinds or any("_pp_stage" in module.__dict__ for module in modules):
        raise ValueError(
            "the model is a pipeline stage, whose layers see no loss and no task ids: train the whole model with "
            "DistributedDataParallel or fully_shard after replace_linear_with_align_lora"
        )
    parallel = any((module.__dict__.get("_tp_size") or 1) > 1 for module in modules)
    # DTensor by its attribute: its module takes long to import.
    sharded = "FSDPModule" not in kinds and any(hasattr(p, "device_mesh") for p in model.parameters())
    if parallel or sharded:
        raise ValueError(
            "the model's weights are split over processes (tensor parallelism): load it without a tensor parallel "
            "plan, call replace_linear_with_align_lora, then use DistributedDataParallel or fully_shard"
        )


def world_size() -> int:
    """Returns the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_processes_apart(
    joined: int, cure: str = 'call torch.distributed.init_process_group("gloo" or "nccl") first'
) -> None:
    """Raises RuntimeError if a launcher started several processes and only this one, joined=1, would share a step."""
    started = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and started.isdecimal() and int(started) > 1 and joined == 1:
        raise RuntimeError(f"{started} processes were started, but each would train by itself: {cure}")
