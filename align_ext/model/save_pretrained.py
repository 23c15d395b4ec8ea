"""Makes save_pretrained of a model with adapters write an adapter's folder, as that of a PeftModel does.

If another model contains the adapted model, its save_pretrained is detected when it asks the adapted layers for their
state_dict, and is refused. A state_dict for any other use is allowed.
"""

import functools
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from align_ext.adapters.adapted_linear import AdaptedModule
from align_ext.alignment.model_state import require_state
from align_ext.base_model.ties import follow_ties, restore_ties
from align_ext.model.disable import disable_adapter
from align_ext.system.messages import shown_path

logger = logging.getLogger(__name__)
# Logged when Trainer saves without gathered weights; an exception in this one process would leave the others waiting.
_NOT_GATHERED = (
    "no adapter is in %s, since the parameters are in parts and were not gathered: DeepSpeed's own files alone are "
    'there, to resume from; give its configuration "stage3_gather_16bit_weights_on_model_save": true, or use '
    "AlignTrainer, or call save_adapter(model, folder) in every process"
)

_CURE = "save_adapter(model, folder) of the model that was adapted, or merge_and_unload(model) first"
_PEFT_METHODS = (
    "merge_and_unload", "unload", "merge_adapter", "unmerge_adapter", "add_adapter", "load_adapter", "delete_adapter",
    "disable_adapter_layers", "enable_adapter_layers", "add_weighted_adapter",
)  # fmt: skip


def override_methods(model: nn.Module) -> None:
    """Makes save_pretrained (also for push_to_hub and Trainer) write the adapter's folder; submodules refuse it.

    Methods of a PeftModel that would silently ignore the adapters raise an error; its disable_adapter is ours.
    """
    follow_ties(model)
    for module in model.modules():
        if any(isinstance(m, AdaptedModule) for m in module.modules()):
            # Partial functions, since these can be copied and pickled with the model.
            if hasattr(type(module), "save_pretrained"):
                write: Any = _save if module is model else _refuse_submodule
                module.save_pretrained = functools.partial(write, module)  # type: ignore[assignment]
                if module is model:
                    card = functools.partial(_update_card, module)
                    module.create_or_update_model_card = card  # type: ignore[assignment]
            for name in _PEFT_METHODS if _is_peft(module) else ():
                setattr(module, name, functools.partial(_refuse_peft, name))
            if _is_peft(module):
                module.disable_adapter = functools.partial(disable_adapter, module)  # type: ignore[assignment]


def restore_methods(model: nn.Module) -> nn.Module:
    """Restores a model's own methods, and removes the attributes that say that PEFT adapted it.

    Returns:
        The plain model; for a PeftModel, the model inside it, as PEFT's own unload returns.
    """
    restore_ties(model)
    for module in model.modules():
        for name in ("save_pretrained", "create_or_update_model_card", "disable_adapter", *_PEFT_METHODS):
            module.__dict__.pop(name, None)
        if not _is_peft(module):
            for name in ("peft_config", "_hf_peft_config_loaded"):  # with them, transformers would save only an adapter
                module.__dict__.pop(name, None)
        elif hasattr(type(module), "save_pretrained"):
            module.save_pretrained = _refuse_empty  # type: ignore[assignment]
    return model.get_base_model() if hasattr(type(model), "get_base_model") and _is_peft(model) else model  # type: ignore[operator]


def _is_peft(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's wrappers around a model."""
    return any(kind.__module__.startswith("peft.") for kind in type(module).__mro__) and hasattr(module, "peft_config")


def _save(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **other: Any,
) -> None:
    """Writes the adapter's folder, from a state_dict if the caller has gathered the parameters."""
    from align_ext.base_model.sharded import shard_ranks
    from align_ext.io.save_adapter import write_adapter

    if other.get("push_to_hub"):
        raise ValueError("push_to_hub=True: save the adapter first, or call model.push_to_hub(name)")
    _check_trainer()
    sharded = bool(shard_ranks(model.parameters()))
    if state_dict is not None and not state_dict and sharded:
        logger.error(_NOT_GATHERED, shown_path(save_directory))
    elif is_main_process or (state_dict is None and sharded):
        write_adapter(model, save_directory, (), state_dict)


def _update_card(model: nn.Module, output_dir: str | os.PathLike[str]) -> None:
    """Writes the model card of a folder that save_pretrained wrote; Trainer calls it for the cards that it makes."""
    from align_ext.io.model_card import CardFacts, update_card
    from align_ext.model.cost import count_parameters

    config = require_state(model).config
    update_card(output_dir, CardFacts.of(model, config, count_parameters(model).trainable, ()))


def _refuse_submodule(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"this {type(module).__name__} is a part of a model with adapters, whose folder would come back without them: "
        "save_adapter(model, folder) of the whole model, or merge_and_unload(model) first"
    )


def refuse_outer_model(layer: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Raises if any model's save_pretrained asks for a layer's tensors."""
    for method, owner in _callers():
        if method == "save_pretrained":
            raise RuntimeError(
                f"this {type(owner).__name__} holds a model with adapters ({prefix.rstrip('.')}), and its folder would "
                f"come back without them: {_CURE}"
            )


def _check_trainer() -> None:
    """Warns at the first checkpoint of transformers' own Trainer that it cannot load it again, or raises."""
    for method, owner in _callers():
        args: Any = getattr(owner, "args", None) if method == "_save" else None
        if not hasattr(args, "load_best_model_at_end") or owner.is_deepspeed_enabled or owner.is_fsdp_enabled:
            continue
        what = f"{type(owner).__name__} writes the adapters, but cannot read them from its checkpoints"
        if args.load_best_model_at_end:
            raise ValueError(f"load_best_model_at_end=True: {what}: use AlignTrainer or AlignSFTTrainer")
        warnings.warn(f"{what} to go on (resume_from_checkpoint): use AlignTrainer or AlignSFTTrainer", stacklevel=2)


def _callers() -> Iterator[tuple[str, Any]]:
    """Yields the name and the object (self) of each function on the call stack, innermost first."""
    frame = sys._getframe().f_back
    while frame is not None:
        yield frame.f_code.co_name, frame.f_locals.get("self")
        frame = frame.f_back


def _refuse_peft(name: str, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"PEFT's {name} would pass over the adapters, which align_ext adopted: use its merge_and_unload(model), "
        "unload(model), save_adapter(model, folder) and load_adapter(model, folder); several adapters, and trainers "
        "that add a copy of one as their reference (TRL's), take a plain model with replace_linear_with_align_lora"
    )


def _refuse_empty(*args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        "the PeftModel has no adapter any more, it was merged or unloaded: save the plain model, which "
        "merge_and_unload(model) and unload(model) return"
    )
