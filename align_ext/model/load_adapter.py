"""Loads an adapter's folder into a model strictly; if anything fails, the model is unchanged."""

import logging
import os
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.base import Adapter
from align_ext.alignment.model_state import find_state, require_state
from align_ext.base_model.modules_to_save import (
    ROWS,
    biases,
    check_ties,
    parameters_to_load,
    plain_name,
    set_buffers,
    start_training,
    tensors_of,
    trained_rows,
)
from align_ext.base_model.select_experts import expert_tensors
from align_ext.base_model.select_layers import ALL_LINEAR
from align_ext.base_model.sharded import full_shapes, full_values, set_values, unwrapped
from align_ext.base_model.token_rows import rows_to_train
from align_ext.config import AlignLoraConfig
from align_ext.io.adapter_folder import AdapterFolder, adapter_tensors, key_options
from align_ext.io.peft_format import PEFT_CONFIG
from align_ext.model.named import active_adapter, new_adapter
from align_ext.model.replace import insert_adapters, layer_names
from align_ext.system.messages import shown, shown_path
from align_ext.system.names import check_names
from align_ext.system.tensors import check_tensors

logger = logging.getLogger(__name__)


def load_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    revision: str | None = None,
    force: bool = False,
) -> nn.Module:
    """Loads an adapter of save_adapter or of stock PEFT strictly, from a folder or the hub; training can be continued.

    Tensors that were trained beside the adapters replace the base's values; unload restores these.

    Args:
        model: a plain model, into which the folder's adapters are inserted, or one with adapters of the same kind.
        folder: the folder, or a hub id, "owner/name", of which the adapter's tensors and options are downloaded.
        adapter_name: the adapter that gets the folder's values, active or not, or that is added to those that the model
            has (set_adapter makes it the active one); None: the active one.
        revision: a branch, tag or commit of the hub's repository.
        force: load it even if its record says that it belongs to another base model.

    Returns:
        The model.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes, dtypes that would be rounded, weights that are not finite,
            files that do not belong together or were edited, options that differ from the model's, another base model,
            no such folder, or a repository that the hub does not give and that is not in its cache. The model is then
            unchanged.
    """
    outer, model = model, unwrapped(model)
    state = find_state(model)
    if state is not None and adapter_name not in (None, state.name):
        assert adapter_name is not None
        known = adapter_name in state.others
        with active_adapter(model, adapter_name) if known else new_adapter(model, adapter_name):
            load_adapter(model, folder, revision=revision, force=force)
        return outer
    if adapter_name is not None:
        check_names([adapter_name], "adapter_name")
    stored = AdapterFolder.read(folder, revision)
    if state is not None:
        _refuse_other_options(stored, state.config)
    rows = rows_to_train(model, stored.config, ()) if state is None else []
    for one in rows:  # PEFT may write rows of a tied module again
        same = [f"{name}.{ROWS}" for name in (one.name, *one.shared) if f"{name}.{ROWS}" in stored.trained]
        if all(torch.equal(stored.trained[same[0]], stored.trained[other]) for other in same[1:]):
            for other in same[1:]:
                del stored.trained[other]
    check_ties(model, stored.trained, alone=not stored.tied)  # before check_model, which would report another base
    replaced = {f"{name}.weight": one.tokens for one in rows for name in (one.name, *one.shared)}
    by_name = stored.peft.get("target_modules") != ALL_LINEAR  # which leaves the head out
    layers, experts = ([], {}) if state is not None else (layer_names(model, with_head=by_name), expert_tensors(model))
    stored.check_model(model, layers, experts, replaced, force=force)
    if state is None and stored.plain:
        _refuse_lost_biases(model, stored)
    _refuse_other_weights(model, stored, replaced)
    shapes = {f"{one.name}.{ROWS}": one.empty() for one in rows}
    parameters = parameters_to_load(model, stored.trained, shapes)
    if state is None:
        insert_adapters(
            outer, stored.config, stored.ranks(), stored.trained, lambda new: _fill(model, new, stored, stored.config)
        )
    else:
        existing = {name: layer.adapter for name, layer in adapted_layers(model).items()}
        _fill(model, existing, stored, state.config)
    rounded = [n for n, t in parameters.items() if torch.promote_types(stored.trained[n].dtype, t.dtype) != t.dtype]
    if rounded:
        logger.warning("%s is rounded to %s, as the base model is", ", ".join(rounded), parameters[rounded[0]].dtype)
    if state is None:
        start_training(model, stored.trained)
        require_state(model).name = adapter_name or "default"
        parameters |= {f"{name}.{ROWS}": module.adapter.rows for name, module in trained_rows(model).items()}
    set_values(parameters, stored.trained, "load_adapter")
    set_buffers(model, stored.trained)
    return outer


def _fill(model: nn.Module, layers: Mapping[str, Adapter], stored: AdapterFolder, config: AlignLoraConfig) -> None:
    """Sets a model's adapters to the folder's values after all checks."""
    adapters, tensors = {plain_name(model, name): adapter for name, adapter in layers.items()}, stored.state()
    state, here, there = adapter_tensors(adapters), config.target_modules, stored.config.target_modules
    hint = f"; target_modules={shown(there)} in the folder, {shown(here)} in the model"
    check_tensors(tensors, full_shapes(state), hint)
    for key, tensor in state.items():
        if torch.promote_types(tensors[key].dtype, tensor.dtype) != tensor.dtype:
            raise ValueError(
                f"{key} is {tensors[key].dtype}, which the model's {tensor.dtype} would round: adapt the model with "
                'adapter_dtype="float32" first, or load the base model in a wider dtype'
            )
    set_values(state, tensors, "load_adapter")
    for name, adapter in adapters.items():
        adapter.scaling = stored.adapters[name].scaling


def _refuse_other_weights(model: nn.Module, stored: AdapterFolder, replaced: Mapping[str, Sequence[int]]) -> None:
    """Raises if weights of the base that PEFT wrote are not the model's, but for rows that the folder replaces."""
    weights = tensors_of(model)
    here = full_values({name: weights[name] for name in stored.written if name in weights}, "load_adapter")
    for name, there in stored.written.items():
        kept = [row for row in range(there.shape[0]) if row not in {*replaced.get(name, ())}]
        if (
            name in here
            and here[name].shape == there.shape
            and torch.equal(here[name][kept], there[kept].to(here[name]))
        ):
            continue
        raise ValueError(
            f"{shown_path(stored.path)} holds {name}, not the model's: if PEFT wrote a module that was resized "
            f"or trained (save_embedding_layers), name it in modules_to_save of {PEFT_CONFIG}"
        )


def _refuse_lost_biases(model: nn.Module, stored: AdapterFolder) -> None:
    """Raises if a folder of stock PEFT has no tensors of biases that its option trains in this model."""
    lost = [name for name in biases(model, stored.config.bias, stored.adapters) if name not in stored.trained]
    if lost:
        raise ValueError(
            f"{shown_path(stored.path)} has bias={stored.config.bias!r} and no {lost[0]}: some are lost, or it belongs "
            "to another model"
        )


def _refuse_other_options(stored: AdapterFolder, config: AlignLoraConfig) -> None:
    """Raises if the model's and the folder's adapters have different options; names the first that differs."""
    here, there = key_options(config), key_options(stored.config)
    for option, value in there.items():
        if here.get(option) != value:
            raise ValueError(
                f"the adapter in {stored.path} has {option}={getattr(stored.config, option)!r}, the model's adapters "
                f"{option}={getattr(config, option)!r}: adapt the model with the folder's, or load it into a plain one"
            )
