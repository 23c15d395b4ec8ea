"""Several adapters in one model by name, of which one is active; the others cost their own parameters alone.

The first one is called "default". An adapter that is not active is not in the model: its layers are kept beside it, and
what it trains beside them has its base's values. So every function of the package is about the active one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from align_ext.adapters.adapted_block import Adapted, adapted_layers
from align_ext.adapters.linear_layer import device_of
from align_ext.adapters.trained_rows import TrainedRows
from align_ext.alignment.model_state import AlignState, require_state
from align_ext.base_model.modules_to_save import (
    find_extra_tensors,
    restore_base,
    set_buffers,
    start_training,
    tensors_of,
)
from align_ext.base_model.sharded import refuse_sharded
from align_ext.base_model.token_rows import wrappers_of
from align_ext.config import AlignLoraConfig
from align_ext.model.disable import refuse_merged
from align_ext.model.merge import restore_layers
from align_ext.model.replace import put_in_place, replace_linear_with_align_lora
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown
from align_ext.system.names import check_names


@dataclass
class NamedAdapter:
    """An adapter that is not active.

    Attributes:
        state: the state that its layers share.
        layers: its layers by name, each with the base's layer in it.
        trained: what it trains beside them, by name in the plain model.
        rows: modules of the base, and what takes their places to train some rows of their weight.
    """

    state: AlignState
    layers: dict[str, Adapted]
    trained: dict[str, Tensor]
    rows: dict[nn.Module, TrainedRows]


def adapter_names(model: nn.Module) -> list[str]:
    """Returns the names of a model's adapters, the active one first."""
    state = require_state(model)
    return [state.name, *state.others]


def add_adapter(
    model: nn.Module, adapter_name: str, config: AlignLoraConfig | Mapping[str, Any] | Any = None, **options: Any
) -> None:
    """Adds a further adapter with first values, of any architecture and on any layers; it is not active.

    Args:
        model: a model with adapters.
        adapter_name: its name.
        config: its options, as for replace_linear_with_align_lora; or
        **options: its options one by one.

    Raises:
        ValueError: the model has no adapters, or one of this name; what replace_linear_with_align_lora refuses; or what
            set_adapter refuses. The model is then unchanged.
    """
    with new_adapter(model, adapter_name):
        replace_linear_with_align_lora(model, config, **options)


def set_adapter(model: nn.Module, adapter_name: str) -> None:
    """Makes an adapter the active one, which computes, is trained, saved and merged; the others are set aside.

    An optimizer holds the parameters of the adapter that was active when it was made.

    Args:
        model: a model with adapters, not wrapped (DDP, FSDP) and not merged.
        adapter_name: the adapter's name.

    Raises:
        ValueError: there is no adapter of this name, the active one is merged or disabled, it trains something whose
            value in the base is not kept, or the model is wrapped. The model is then unchanged.
    """
    state = require_state(model)
    if not isinstance(adapter_name, str):
        raise ValueError(
            f"adapter_name must be one name, got {shown(adapter_name)}: one is active; add_weighted_adapter adds "
            "the sum of several, join_adapters one that a batch mixes by task"
        )
    if adapter_name == state.name:
        return
    if adapter_name not in state.others:
        raise ValueError(unknown_name("adapter_name", adapter_name, adapter_names(model)))
    before = _take_off(model)
    _put_on(model, before.state.others.pop(adapter_name))
    before.state.others[before.state.name] = before


def delete_adapter(model: nn.Module, adapter_name: str) -> None:
    """Deletes an adapter that is not active.

    Raises:
        ValueError: there is none of this name, or it is the active one (set_adapter another one, or unload the model).
    """
    state = require_state(model)
    if adapter_name == state.name:
        raise ValueError(
            f"{shown(adapter_name)} is active: set_adapter(model, ...) another one first, or unload(model)"
        )
    if adapter_name not in state.others:
        raise ValueError(unknown_name("adapter_name", adapter_name, adapter_names(model)))
    del state.others[adapter_name]


def named_adapter(model: nn.Module, adapter_name: str) -> NamedAdapter:
    """Returns one of a model's adapters, active or not.

    Raises:
        ValueError: there is none of this name.
    """
    state = require_state(model)
    if adapter_name == state.name:
        return NamedAdapter(state, adapted_layers(model), find_extra_tensors(model).tensors, wrappers_of(model))
    if adapter_name not in state.others:
        raise ValueError(unknown_name("adapter", adapter_name, adapter_names(model)))
    other: NamedAdapter = state.others[adapter_name]
    return other


@contextmanager
def active_adapter(model: nn.Module, adapter_name: str) -> Iterator[nn.Module]:
    """Makes an adapter the active one until the block ends (set_adapter)."""
    before = require_state(model).name
    set_adapter(model, adapter_name)
    try:
        yield model
    finally:
        set_adapter(model, before)


@contextmanager
def new_adapter(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Takes the active adapter off until the block ends; what the block inserts is then kept by this name."""
    check_names([adapter_name], "adapter_name")
    if adapter_name in adapter_names(model):
        raise ValueError(
            f"the model has an adapter {shown(adapter_name)} already: delete_adapter it, or take another name"
        )
    before = _take_off(model)
    try:
        yield
        added = _take_off(model)
    finally:
        _put_on(model, before)
    added.state.name, added.state.others = adapter_name, before.state.others
    before.state.others[adapter_name] = added


def _take_off(model: nn.Module) -> NamedAdapter:
    """Makes a model its base again, and returns its adapter."""
    refuse_sharded(model, "set_adapter")
    state, layers = require_state(model), adapted_layers(model)
    if state.report.adopted:
        raise ValueError("an adopted PeftModel has its one adapter: save_adapter(model, folder), and load_adapter it "
                         "and others by name into the plain model")  # fmt: skip
    if state.disabled or state.current is not None:
        raise ValueError("the adapter is disabled, or a step of it is open: leave that block first")
    refuse_merged(layers)
    trained = {name: tensor.detach().clone() for name, tensor in find_extra_tensors(model).tensors.items()}
    rows = wrappers_of(model)
    restore_base(model)
    restore_layers(model, layers)
    return NamedAdapter(state, layers, trained, rows)


def _put_on(model: nn.Module, adapter: NamedAdapter) -> None:
    """Gives a base its adapter back."""
    for layer in (*adapter.layers.values(), *adapter.rows.values()):
        layer.adapter.to(device_of(layer.base_layer))
    put_in_place(model, adapter.state, adapter.layers, adapter.rows)
    parameters = {name: tensor for name, tensor in tensors_of(model).items() if isinstance(tensor, nn.Parameter)}
    start_training(model, [name for name in adapter.trained if name in parameters])
    for name, value in adapter.trained.items():
        if name in parameters:
            parameters[name].data.copy_(value)
    set_buffers(model, adapter.trained)
