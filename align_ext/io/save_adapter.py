"""Adapters into folders; load.py reads them.

save_adapter(model, folder) writes, all at once or not at all:

| file | content |
|---|---|
| adapter_model.safetensors, adapter_config.json | the adapter as one LoRA a layer, dropout off: for PEFT and vLLM too |
| align_lora_heads.safetensors | every parameter and buffer of the adapters, where PEFT's form loses some |
| align_trained.safetensors | what was trained beside the adapters, where PEFT's form is not all there is |
| align_lora_config.json | every option |

- lora, align_lora: PEFT's form is everything, and the only weights. From a PiSSA start, with the frozen offset A0, B0:
  PEFT's form has rank 2r, [A; A0] and [B, -B0], beside the untouched base; the rest is in the heads' file.
- m_lora, hydra without a router: PEFT's form is their dropout-free sum, [A; A0] and [c Σ B_i, -B0] (A and c Σ B_i where
  there is no offset); the heads are in the heads' file.
- multi_adapter: PEFT's form of each task is in tasks/<name or number>/.
- lora_moe, hydra, r_lora, mtlora, and adapters beside whole blocks: the change of the weights depends on the input, or
  belongs to no one layer, so PEFT has no form of them. There is no adapter_config.json, and PeftModel.from_pretrained
  says "Can't find 'adapter_config.json'": load such a folder with load_adapter.

What else is trained (modules_to_save, whatever requires a gradient, buffers that training changed) is in PEFT's form as
modules_to_save, if it makes whole modules. Where it does not, say a bias alone or the running statistics of a frozen
BatchNorm, or where stock PEFT would take a model's layers for others, PEFT has no form either.

Nothing is pickled, and load_adapter checks keys, shapes, dtypes, finiteness, and that the files belong together.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from align_ext.adapters.adapted_block import Adapted, adapted_layers
from align_ext.adapters.base import Adapter, is_conv1d
from align_ext.alignment.model_state import AlignState, find_state
from align_ext.base_model.adopt_peft import refuse_foreign
from align_ext.base_model.fingerprint import BaseModel
from align_ext.base_model.modules_to_save import Beside, plain_name, trained_beside
from align_ext.base_model.peft_names import peft_misreads
from align_ext.base_model.sharded import holders, one_writes, unwrapped, whole
from align_ext.base_model.task_type import task_type_of
from align_ext.io.adapter_folder import (
    ADAPTER_FILES,
    OUR_CONFIG,
    STATE,
    TRAINED,
    adapters_of,
    checked_task_names,
    decisive,
    state_of,
    write_json,
)
from align_ext.io.peft_format import (
    PEFT_CONFIG,
    WEIGHTS,
    PeftForm,
    is_plain,
    named_task,
    peft_form,
    peft_forms,
    unexportable_reason,
)
from align_ext.system.bounds import is_whole
from align_ext.system.reading import shown
from align_ext.system.tensors import digest_of, write_tensors
from align_ext.system.writing import atomic_folder


@dataclass(frozen=True)
class _Whole:
    """What is trained in a model, by names in the plain model, whole and on the CPU."""

    model: nn.Module
    state: AlignState
    layers: dict[str, Adapted]
    adapters: dict[str, Adapter]
    beside: Beside
    base: BaseModel
    ranks: tuple[int, ...]  # the processes that hold parts of it

    @classmethod
    def of(cls, model: nn.Module, what: str, gathered: Mapping[str, Tensor] | None = None) -> _Whole:
        """Reads a model's, or what others gathered of it; `what` is the name of the function that does."""
        model = unwrapped(model)
        refuse_foreign(model)
        layers = {plain_name(model, name): layer for name, layer in adapted_layers(model).items()}
        state, beside = _state(model), trained_beside(model)
        own = state_of({name: layer.adapter for name, layer in layers.items()})
        live = own | beside.tensors
        ranks = holders(live.values())
        if gathered is not None and ranks:
            keys = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
            lacking = next((name for name, tensor in live.items() if keys.get(id(tensor)) not in gathered), None)
            if lacking is not None:
                raise ValueError(f"the state_dict has no {lacking}: give the whole one, or none, in every process")
            live, ranks = {name: gathered[keys[id(tensor)]] for name, tensor in live.items()}, ()
        values = whole(live, what)
        scaling = {name: layer.adapter.scaling for name, layer in layers.items()}
        adapters = adapters_of(state.config, {name: values[name] for name in own}, scaling, state)
        beside = replace(beside, tensors={name: values[name] for name in beside.tensors})
        return cls(model, state, layers, adapters, beside, BaseModel.of(model), ranks)

    def cannot_write(self) -> str | None:
        """Why stock PEFT would not read this in the model as it is, or None."""
        return peft_misreads(self.model, list(self.layers)) or self.beside.unexportable_reason(self.model)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], task_names: Sequence[str] = ()) -> None:
    """Writes the adapters as a folder that load_adapter reads to the bit, and stock PEFT if it has a form of them.

    Where parameters are in parts (FSDP2, ZeRO-3), every process has to call it; one writes, and all return when the
    folder is whole.

    Args:
        model: adapted by replace_linear_with_align_lora.
        folder: gets the files of the table above; other files in it stay.
        task_names: of tasks 0, 1, ...; kept, and with multi_adapter the names of the tasks' folders. Tasks beyond them
            are called by their numbers.

    Raises:
        ValueError: the model has no adapters, or PEFT's layers beside them, a weight is not finite, or the names do
            not fit.
        RuntimeError: parameters are in parts, and not all processes called it.
    """
    write_adapter(model, folder, task_names)


def write_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    task_names: Sequence[str] = (),
    gathered: Mapping[str, Tensor] | None = None,
) -> None:
    """What save_adapter does; gathered: the model's state_dict, whole, where its parameters are in parts."""
    names = checked_task_names(task_names, _state(model).config)
    it = _Whole.of(model, "save_adapter", gathered)
    adapters, config, beside = it.adapters, it.state.config, it.beside.tensors
    scaling = {name: adapter.scaling for name, adapter in adapters.items()}
    scaling = {} if set(scaling.values()) == {config.scaling} else scaling
    with_peft, state = it.cannot_write() is None, state_of(adapters)
    plain = with_peft and is_plain(adapters, config)
    record = {"options": decisive(config, scaling, names), "base": it.base.to_dict()}
    options = config.to_dict() | {"digest": digest_of(state | beside)}
    options |= ({"task_names": list(names)} if names else {}) | ({"layer_scaling": scaling} if scaling else {})
    with one_writes(it.ranks) as writes, atomic_folder(folder, ADAPTER_FILES) if writes else nullcontext() as path:
        if path is None:
            return
        for where, form in peft_forms(adapters, config, names, beside).items() if with_peft else ():
            _write_peft(path / where, form, it, record if plain else None)
        if not plain:
            write_tensors(path / STATE, state, record)
            if beside:
                write_tensors(path / TRAINED, beside)
        write_json(path / OUR_CONFIG, options)


def export_peft(model: nn.Module, folder: str | os.PathLike[str], task: int | None = None) -> None:
    """Writes the adapter as stock PEFT's own folder, with nothing of ours: for other programs, or to publish.

    Where parameters are in parts, every process has to call it, as save_adapter.

    Args:
        model: adapted by replace_linear_with_align_lora.
        folder: gets adapter_model.safetensors and adapter_config.json; other files in it stay.
        task: multi_adapter: the task; None: the one that set_task named.

    Raises:
        ValueError: PEFT has no form of these adapters (the message says why), a weight is not finite, or there is no
            such task.
        RuntimeError: parameters are in parts, and not all processes called it.
    """
    config = _state(model).config
    if task is not None:
        tasks = (config.num_tasks or 0) if config.architecture == "multi_adapter" else 0
        if not is_whole(task, 0, tasks - 1):
            raise ValueError(f"task={shown(task)}: the model has an adapter for each of {tasks} tasks, by number")
    it = _Whole.of(model, "export_peft")
    with nullcontext() if task is None else named_task(it.adapters, task):
        if reason := unexportable_reason(it.adapters, config) or it.cannot_write():
            raise ValueError(f"PEFT has no form of this adapter: {reason}")
        form = peft_form(it.adapters, config, it.beside.tensors)
    with one_writes(it.ranks) as writes, atomic_folder(folder, ADAPTER_FILES) if writes else nullcontext() as path:
        if path is not None:
            _write_peft(path, form, it)


def _state(model: nn.Module) -> AlignState:
    state = find_state(model)
    if state is None:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    return state


def _write_peft(path: Path, form: PeftForm, it: _Whole, record: Mapping[str, Any] | None = None) -> None:
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / WEIGHTS, form.tensors, record or {"base": it.base.to_dict()})
    content = {
        "peft_type": "LORA",
        "task_type": task_type_of(it.model, it.beside.modules),
        "base_model_name_or_path": it.base.name,
        **form.options,
        "lora_dropout": it.state.config.lora_dropout,
        "target_modules": _target_modules(it.model, list(it.layers)),
        "modules_to_save": list(it.beside.modules) or None,
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in it.layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    write_json(path / PEFT_CONFIG, content)


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of the names where they select the same layers, full names otherwise."""
    kinds, own = sorted({name.rpartition(".")[2] for name in names}), set(names)
    others = (n for n, _ in model.named_modules() if n.rpartition(".")[2] in kinds and plain_name(model, n) not in own)
    return kinds if next(others, None) is None else names
