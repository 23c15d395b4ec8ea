"""Forward hooks that open and close a step round the model's own forward: model(**batch, task_ids=ids).

The hooks also hand the model's attention_mask and labels to a step that align_step opened.
"""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.alignment.activation_checkpoint import BoundCheckpoint
from align_ext.alignment.context import open_step
from align_ext.alignment.model_state import AlignState
from align_ext.alignment.sources import watch_parts
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig

_EVAL = (
    "the loss of a model in eval mode was differentiated: nothing is aligned and nothing dropped out there; call "
    "model.train() first (from_pretrained returns a model in eval mode)"
)


def register_hooks(model: nn.Module, state: AlignState) -> None:
    """Gives the model's forward the argument task_ids; after an error the model is unchanged."""
    of_parts = watch_parts(model, state)
    model.align_state = state  # type: ignore[assignment]
    # Taken from the outermost signature: transformers' decorators hide the names from the code object.
    state.arguments = tuple(inspect.signature(type(model).forward).parameters)[1:]
    state.handles = (
        model.register_forward_pre_hook(_before_forward, with_kwargs=True),
        model.register_forward_hook(_after_forward, with_kwargs=True, always_call=True),
        *of_parts,
    )


def remove_hooks(model: nn.Module) -> None:
    """Undoes register_hooks, and gives the model its own checkpoint functions back."""
    state: Any = model.align_state
    for handle in state.handles:
        handle.remove()
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, BoundCheckpoint):
            module._gradient_checkpointing_func = checkpoint.checkpoint  # type: ignore[assignment]
    del model.align_state


CACHE = ("cache", "past_key_values")  # the name in transformers from 5.24 on, and before


def _given(state: AlignState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a model's forward by name, however they were passed."""
    return dict(zip(state.arguments, args, strict=False)) | kwargs


def _before_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Takes task_ids= out of the arguments and opens the step; or gives an open step the padding."""
    state: Any = module.align_state
    ids, step = kwargs.pop("task_ids", None), state.current
    if state.disabled or (step is not None and step.seen and not torch.is_grad_enabled()):
        state.current, state.suspended = None, step  # no adapters, or a second forward for metrics, as TRL makes one
        return args, kwargs
    if ids is not None and step is not None:
        raise RuntimeError("task ids were given twice: by align_step and by task_ids=")
    if step is None and _opens(state.config, module.training, ids):
        given = _given(state, args, kwargs)
        _open_by_keyword(module, state, ids, given)
    elif step is None and module.training and state.config.needs_step:
        state.find()  # raises: training has no step, and no layer ran yet
    elif step is not None:
        given = _given(state, args, kwargs)
        if not step.masked and given.get("attention_mask") is not None and torch.compiler.is_compiling():
            raise RuntimeError("under torch.compile give align_step the attention_mask: align_step(model, ids, mask)")
        _mask(step, given)
    return args, kwargs


def _mask(step: AlignStep, given: Mapping[str, Any]) -> None:
    """Gives a step the masks among a forward's arguments, which say what tokens count."""
    if step.records and given.get("encoder_hidden_states") is not None:
        raise RuntimeError(
            "the model was given encoder_hidden_states, whose tokens its cross-attention reads: adapt and call the "
            "whole encoder-decoder, so that both masks are known"
        )
    mask, labels = given.get("attention_mask"), given.get("labels")
    tokens = given.get("input_ids")
    if isinstance(tokens, Tensor) and tokens.dim() > 1:
        step.check_samples(len(tokens))
    if isinstance(tokens, Tensor) and tokens.dim() == 3:  # [B, choices, S] of a multiple choice
        step.with_choices(tokens.shape[1])
        mask = mask.flatten(0, 1) if isinstance(mask, Tensor) and mask.shape == tokens.shape else mask
    if not step.masked:
        step.mask(mask, labels)
    if step.state.encoder_decoder:
        step.mask_decoder(given.get("decoder_attention_mask"), labels)


def _opens(config: AlignLoraConfig, training: bool, ids: Tensor | None) -> bool:
    """Whether a forward opens a step: in training, and in evaluation if the output depends on tasks or sequences."""
    if training:
        return config.needs_step and (ids is not None or not config.needs_ids)
    return config.routing == "sequence" or (config.row.by_task and ids is not None)


@torch.compiler.disable
def _open_by_keyword(module: nn.Module, state: AlignState, ids: Tensor | None, given: Mapping[str, Any]) -> None:
    ids = ids if state.config.needs_ids else None
    step = open_step(module, state, ids, by_keyword=True, records=module.training)
    cache = next((given[name] for name in CACHE if name in given), None)
    step.decoding = cache is not None and cache.get_seq_length() > 0
    if not step.decoding:  # while decoding, the mask covers the cached tokens too, and the new tokens are not a prompt
        _mask(step, given)
    state.current = step


def _after_forward(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Closes a step that task_ids= opened; the output's loss becomes the total."""
    state: Any = module.align_state
    if state.suspended is not None:
        state.current, state.suspended = state.suspended, None
        return None
    if state.disabled:
        return None
    if state.current is not None and state.current.by_keyword:
        return _close_by_keyword(state, output, _given(state, args, kwargs).get("labels") is not None)
    if torch.compiler.is_compiling():
        return None
    loss = output.get("loss") if isinstance(output, dict) else None
    if not state.config.needs_step and module.training and isinstance(loss, Tensor):
        state.lm = loss.detach()
    elif state.config.needs_step and not module.training and isinstance(loss, Tensor) and loss.requires_grad:
        loss.register_hook(_warn_evaluation)  # training was probably meant
    return None


@torch.compiler.disable
def _close_by_keyword(state: AlignState, output: Any, has_loss: bool) -> Any:
    step, state.current = state.current, None
    assert step is not None
    if not step.records:
        return None
    if isinstance(output, dict) and output.get("loss") is not None:
        output["loss"] = step.total(output["loss"])
    elif isinstance(output, tuple) and has_loss:  # return_dict=False
        output = (step.total(output[0]), *output[1:])
    return output


def _warn_evaluation(gradient: Tensor) -> None:
    warnings.warn(_EVAL, stacklevel=2)
