"""An adapter's folder into a model: strictly, or the model is as it was."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch
from torch import nn

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.base import Adapter
from align_ext.alignment.model_state import find_state
from align_ext.base_model.modules_to_save import (
    check_ties,
    fill_buffers,
    parameters_to_fill,
    plain_name,
    start_training,
)
from align_ext.base_model.sharded import fill, outlines, unwrapped
from align_ext.config import AlignLoraConfig
from align_ext.io.adapter_folder import AdapterFolder, decisive, state_of
from align_ext.model.replace import insert_adapters, layer_names
from align_ext.system.reading import shown
from align_ext.system.tensors import check_tensors

logger = logging.getLogger(__name__)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], *, force: bool = False) -> nn.Module:
    """Loads an adapter folder of save_adapter or of stock PEFT, strictly; training goes on where it stopped.

    What was trained beside the adapters takes the place of the base's values, which unload gives back.

    Args:
        model: a plain model, which is adapted first as the folder says, or one with adapters of the same kind.
        folder: the folder.
        force: load it also where its record says that it belongs to another base model.

    Returns:
        The model.

    Raises:
        ValueError: missing or unexpected keys, other shapes, dtypes that would be rounded, weights that are not finite,
            files that do not belong together or were edited, options that differ from the model's, another base model,
            or no such folder. The model is then as it was.
    """
    outer, model = model, unwrapped(model)
    stored = AdapterFolder.read(folder)
    state = find_state(model)
    if state is not None:
        _refuse_other_options(stored, state.config)
    check_ties(model, stored.trained, alone=not stored.tied)  # first, since another tying looks like another base
    stored.check_model(model, layer_names(model) if state is None else [], force=force)
    beside = parameters_to_fill(model, stored.trained)
    if state is None:
        insert_adapters(
            outer, stored.config, stored.ranks(), stored.trained, lambda own: _fill(model, own, stored, stored.config)
        )
    else:
        own = {name: layer.adapter for name, layer in adapted_layers(model).items()}
        _fill(model, own, stored, state.config)
    rounded = [n for n, t in beside.items() if torch.promote_types(stored.trained[n].dtype, t.dtype) != t.dtype]
    if rounded:
        logger.warning("%s is rounded to %s, as the base model is", ", ".join(rounded), beside[rounded[0]].dtype)
    if state is None:
        start_training(model, stored.trained)
    fill(beside, stored.trained, "load_adapter")
    fill_buffers(model, stored.trained)
    return outer


def _fill(model: nn.Module, own: Mapping[str, Adapter], stored: AdapterFolder, config: AlignLoraConfig) -> None:
    """Gives a model's adapters the folder's values, after all checks."""
    adapters, tensors = {plain_name(model, name): adapter for name, adapter in own.items()}, stored.state()
    state, here, there = state_of(adapters), config.target_modules, stored.config.target_modules
    hint = f"; target_modules={shown(there)} in the folder, {shown(here)} in the model"
    check_tensors(tensors, outlines(state), hint)
    for key, tensor in state.items():
        if torch.promote_types(tensors[key].dtype, tensor.dtype) != tensor.dtype:
            raise ValueError(
                f"{key} is {tensors[key].dtype}, which the model's {tensor.dtype} would round: adapt the model with "
                'adapter_dtype="float32" first, or load the base model in a wider dtype'
            )
    fill(state, tensors, "load_adapter")
    for name, adapter in adapters.items():
        adapter.scaling = stored.adapters[name].scaling


def _refuse_other_options(stored: AdapterFolder, config: AlignLoraConfig) -> None:
    """Raises if the model's adapters are of another kind than the folder's; names the first option that differs."""
    here, there = decisive(config), decisive(stored.config)
    for option, value in there.items():
        if here[option] != value:
            raise ValueError(
                f"the adapter in {stored.path} has {option}={getattr(stored.config, option)!r}, the model's adapters "
                f"{option}={getattr(config, option)!r}: load it into a plain model, or adapt this one alike"
            )
