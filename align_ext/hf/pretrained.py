"""save_pretrained of a model with adapters: an adapter's folder, as of a PeftModel, not weights under odd names."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import Tensor, nn

from align_ext.nn.base import AdaptedModule
from align_ext.reading import place

logger = logging.getLogger(__name__)
# Trainer's stand-in for weights that nobody gathered; an error here, in one process, would leave the others waiting.
_NOT_GATHERED = (
    "no adapter is in %s, since the parameters are in parts and were not gathered: DeepSpeed's own files alone are "
    'there, to resume from; give its configuration "stage3_gather_16bit_weights_on_model_save": true, or use '
    "AlignTrainer, or call save_adapter(model, folder) in every process"
)


def stand_in(model: nn.Module) -> None:
    """Has save_pretrained, and with it push_to_hub and Trainer, write what save_adapter does; not of its parts."""
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and any(isinstance(m, AdaptedModule) for m in module.modules()):
            # Partial functions, since they are copied and pickled with the model.
            write: Any = _save if module is model else _refuse
            module.save_pretrained = functools.partial(write, module)  # type: ignore[assignment]


def stand_down(model: nn.Module) -> None:
    """Gives a model its own save_pretrained again."""
    for module in model.modules():
        module.__dict__.pop("save_pretrained", None)


def _save(
    model: nn.Module,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: Mapping[str, Tensor] | None = None,
    **other: Any,
) -> None:
    """Writes the adapter's folder; from a state_dict, where others gathered the parameters."""
    from align_ext.hf.export import write_adapter
    from align_ext.hf.sharded import holders

    if other.get("push_to_hub"):
        raise ValueError("push_to_hub=True: save the adapter first, or call model.push_to_hub(name)")
    in_parts = bool(holders(model.parameters()))
    if state_dict is not None and not state_dict and in_parts:
        logger.error(_NOT_GATHERED, place(save_directory))
    elif is_main_process or (state_dict is None and in_parts):
        write_adapter(model, save_directory, (), state_dict)


def _refuse(module: nn.Module, *args: Any, **kwargs: Any) -> NoReturn:
    raise RuntimeError(
        f"this {type(module).__name__} is a part of a model with adapters, whose folder would come back without them: "
        "save_adapter(model, folder) of the whole model, or merge_and_unload(model) first"
    )
