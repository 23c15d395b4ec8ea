"""How a training step is opened and closed: align_step, and activation checkpointing's way back into it."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.alignment.activation_checkpoint import BoundCheckpoint
from align_ext.alignment.guards import (
    refuse_compiled_autograd,
    refuse_parts_of_a_model,
    refuse_processes_apart,
    world_size,
)
from align_ext.alignment.loss_report import LossReport
from align_ext.alignment.model_state import AlignState, find_state, require_state
from align_ext.alignment.step import AlignStep
from align_ext.system.bounds import is_whole
from align_ext.system.messages import shown


def open_step(model: nn.Module, state: AlignState, ids: Tensor | None, **options: bool) -> AlignStep:
    """A new step for a model's next forward; the model's checkpoint functions will find it again."""
    refuse_compiled_autograd()
    if world_size() > 1:
        refuse_parts_of_a_model(model)
    elif options.get("records", True):
        refuse_processes_apart(world_size())
    adapter, trained = None, False
    for module in model.modules():
        found = module._parameters.get("lora_A")
        if found is not None and "layer_index" in module.__dict__:
            module.index_on(found.device)  # type: ignore[operator]
        if found is not None and not trained:
            adapter = found
            trained = any(p is not None and p.requires_grad for p in module._parameters.values())
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, BoundCheckpoint):
            checkpoint.state = state
        elif checkpoint is not None:
            module._gradient_checkpointing_func = BoundCheckpoint(state, checkpoint)  # type: ignore[assignment]
    if adapter is not None and not trained and options.get("records", True) and torch.is_grad_enabled():
        raise ValueError(
            "no adapter of the model is trained, so that nothing would be aligned: PEFT's get_peft_model, or a "
            "requires_grad_(False), froze them; adapt the model after it, or call requires_grad_(True) on the adapters"
        )
    state.in_backward.clear()
    like = next(model.parameters()) if adapter is None else adapter
    step = AlignStep(state, None if ids is None else _as_ids(ids), like, **options)
    if step.records:
        state.last = step
    return step


def _as_ids(ids: Any) -> Tensor:
    """Task ids as a tensor, of whatever a caller has them in.

    Raises:
        ValueError: they are none.
    """
    try:
        tensor = torch.as_tensor(ids)
    except Exception as error:  # torch raises anything for what it makes no tensor of
        raise ValueError(f"task_ids must be integers, [B] or [B, S], got {shown(ids)}") from error
    if tensor.is_meta:
        raise ValueError("task_ids must be integers, [B] or [B, S], but are on the meta device, which holds none")
    return tensor


@contextlib.contextmanager
def align_step(
    model: nn.Module,
    task_ids: Tensor | None,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    strict: bool = True,
) -> Iterator[AlignStep]:
    """Opens a training step for one forward of the model; then differentiate step.total(loss).

    Args:
        model: adapted by replace_linear_with_align_lora; may be wrapped by DDP, FSDP2 or torch.compile. Batch first.
        task_ids: int64 [B] (one task a sample) or [B, S] (one a token); -1: belongs to no task. None where nothing
            tells tasks apart (align=None).
        attention_mask: [B, S], 0 = padding, which does not count. Taken from the model's own arguments if not given
            (torch.compile: give it here), and so is decoder_attention_mask.
        labels: [B, S], needed with response_only and routing="sequence", and where no decoder_attention_mask tells an
            encoder-decoder's padding, likewise.
        strict: a backward that meets the layers without the alignment loss is an error.

    Yields:
        The step.

    Raises:
        ValueError: no adapters, none that is trained, nothing that needs a step, or ids of wrong shape, dtype or range.
    """
    state = require_state(model)
    if not state.config.needs_step:
        raise ValueError('alignment is off for this model (align=None): choose align="kl" to use task ids')
    if task_ids is None and state.config.needs_ids:
        raise ValueError("task_ids=None, but the model's options need the tasks: give one id per sample")
    if not model.training:
        raise ValueError("align_step is for training, but the model is in eval mode: call model.train() first")
    step = open_step(model, state, task_ids, strict=strict)
    step.labels = labels
    if attention_mask is not None:
        step.mask(attention_mask, labels)
    outer, state.current = state.current, step
    try:
        yield step
    finally:
        state.current = outer


def align_parts(model: nn.Module) -> LossReport | None:
    """The losses of the model's last training step; None without one, or before its step.total(loss).

    Where nothing is added to the model's own loss (align=None), they are that loss alone, if its forward returned one.
    """
    state = find_state(model)
    if state is not None and state.lm is not None:
        return LossReport(lm=float(state.lm), align=0.0, weight=0.0, per_layer={}, per_task=[])
    if state is None or state.last is None or state.last._lm is None:
        return None
    return state.last.parts()


def set_task(model: nn.Module, task: int | None) -> None:
    """Names the task of what a model with adapters by task evaluates or generates next, where no task_ids are given.

    Args:
        model: with adapters.
        task: in 0 .. num_tasks-1; None: none.

    Raises:
        ValueError: no adapters, or no such task.
    """
    state = require_state(model)
    if task is not None and not state.tasks:
        raise ValueError(f"task={shown(task)}: the model knows of no tasks: give num_tasks in its options")
    if task is not None and not is_whole(task, 0, state.tasks - 1):
        raise ValueError(f"task must be an integer in 0 .. num_tasks-1 = {state.tasks - 1}, or None, got {shown(task)}")
    state.task = task


@contextlib.contextmanager
def named_tasks(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Names the task of each sample, [B], of what such a model evaluates or generates inside the context."""
    state = require_state(model)
    before, state.task = state.task, ids
    try:
        yield
    finally:
        state.task = before
