"""A model's own forward as a way into the step: model(**batch, task_ids=ids), by forward hooks.

The hooks also hand the model's attention_mask and labels to a step that align_step opened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from align_ext.batch import AlignState, open_step


def register_hooks(model: nn.Module, state: AlignState) -> None:
    """Gives the model's forward the argument task_ids."""
    model.align_state = state  # type: ignore[assignment]
    model.align_hooks = (  # type: ignore[assignment]
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
    )


def remove_hooks(model: nn.Module) -> None:
    """Undoes register_hooks."""
    for handle in model.align_hooks:  # type: ignore[union-attr]
        handle.remove()
    del model.align_hooks, model.align_state


def _argument(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> Any:
    """An argument of a model's forward, whichever way it was passed."""
    if name in kwargs or not args:
        return kwargs.get(name)
    code = type(module).forward.__code__
    names = code.co_varnames[1 : code.co_argcount]
    return dict(zip(names, args, strict=False)).get(name)


@torch.compiler.disable
def _open_by_keyword(module: nn.Module, state: AlignState, ids: Tensor, mask: Any, labels: Any) -> None:
    if state.current is not None:
        raise RuntimeError("task ids were given twice: by align_step and by task_ids=")
    if state.config.align is None or not module.training:
        return  # evaluation: ids are optional and nothing is recorded
    step = open_step(module, state, ids, by_keyword=True)
    step.mask(mask, labels)
    state.current = step


@torch.compiler.disable
def _close_by_keyword(state: AlignState, output: Any) -> Any:
    step, state.current = state.current, None
    if isinstance(output, dict) and output.get("loss") is not None:
        assert step is not None
        output["loss"] = step.total(output["loss"])
    return output


def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
    """Forward pre-hook of the model: takes task_ids= out of the arguments and opens the step."""
    state: AlignState = module.align_state  # type: ignore[assignment]
    step = state.current
    if "task_ids" in kwargs:
        ids = kwargs.pop("task_ids")
        if ids is not None:
            mask, labels = (_argument(module, args, kwargs, n) for n in ("attention_mask", "labels"))
            _open_by_keyword(module, state, ids, mask, labels)
        return args, kwargs
    if step is not None and not step.masked:
        mask = _argument(module, args, kwargs, "attention_mask")
        if mask is not None and torch.compiler.is_compiling():
            raise RuntimeError("under torch.compile give align_step the attention_mask: align_step(model, ids, mask)")
        step.mask(mask, _argument(module, args, kwargs, "labels"))
    elif state.config.align is not None and module.training:
        state.find()  # raises if training has no step, before any layer ran
    return None


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the model: closes a step that task_ids= opened; the output's loss becomes the total."""
    state: AlignState = module.align_state  # type: ignore[assignment]
    if state.current is not None and state.current.by_keyword:
        return _close_by_keyword(state, output)
    return None
