"""Saves adapters to folders; model/load_adapter.py loads them.

save_adapter(model, folder) writes all of these files or none:

| file | content |
|---|---|
| adapter_model.safetensors, adapter_config.json | the adapter as one LoRA per layer, without dropout (PEFT, vLLM) |
| align_lora_heads.safetensors | every parameter and buffer of the adapters, if PEFT's format cannot hold all of them |
| align_trained.safetensors | the tensors trained beside the adapters, if PEFT's format cannot hold everything |
| align_lora_config.json | every option |
| README.md | the model card (model_card.py), unless the user has one of their own there |

- lora, align_lora: PEFT's files hold everything, of DoRA m too. With PiSSA, which has a frozen offset
  A0, B0, PEFT's files have rank 2r, [A; A0] and [B, -B0], for the unchanged base, and the heads' file has the
  parameters. Adapters of experts are PEFT's target_parameters (io/peft_experts.py).
- m_lora, hydra without a router: PEFT's files hold the sum without dropout, [A; A0] and [c Σ B_i, -B0] (A and c Σ B_i
  without an offset); the heads are in the heads' file.
- adalora: PEFT's files hold everything in PEFT's form of AdaLoRA (io/peft_adalora.py); export_peft writes a LoRA.
- multilora, nlora: PEFT's files hold the change of the weight, the parameters are in the heads' file.
- multi_adapter, moelora, mtlora_cvpr: the same for each task, PEFT's files in tasks/<name or number>/.
- lora_moe, malora, hydra, r_lora, mtlora, mixlora, and adapters of whole blocks: the change of the weights depends on
  the input, or belongs to no single layer, so PEFT's format cannot hold it. There is no adapter_config.json, and
  PeftModel.from_pretrained says "Can't find 'adapter_config.json'": load such a folder with load_adapter.

Other trained tensors (modules_to_save, parameters that require a gradient, buffers that training changed) are in PEFT's
files as modules_to_save, if they make up whole modules, as its bias, if they are all biases or those of the adapted
layers, and as its trainable_token_indices, if they are rows of embeddings. If they are something else (a single bias,
the running statistics of a frozen BatchNorm), or if stock PEFT would confuse the model's layers, there are no files for
PEFT.

Nothing is pickled, and load_adapter checks keys, shapes, dtypes, finiteness, and that the files belong together.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from align_ext.adapters.adalora import ranks_above_target
from align_ext.adapters.adapted_block import Adapted, adapted_layers
from align_ext.adapters.base import Adapter
from align_ext.adapters.linear_layer import is_transposed
from align_ext.alignment.model_state import AlignState, require_state
from align_ext.base_model.adopt_peft import refuse_peft_layers
from align_ext.base_model.fingerprint import BaseModel
from align_ext.base_model.modules_to_save import ExtraTensors, find_extra_tensors, plain_name
from align_ext.base_model.peft_names import peft_misreads
from align_ext.base_model.sharded import full_values, one_writer, shard_ranks, unwrapped
from align_ext.base_model.task_type import task_type_of
from align_ext.io.adapter_folder import (
    OUR_CONFIG,
    STATE,
    TRAINED,
    adapter_files,
    adapter_tensors,
    build_adapters,
    checked_task_names,
    key_options,
    write_json,
)
from align_ext.io.model_card import CARD, CardFacts, has_own_card
from align_ext.io.peft_experts import peft_keys
from align_ext.io.peft_format import (
    PEFT_CONFIG,
    WEIGHTS,
    PeftForm,
    by_kind,
    is_plain,
    peft_form,
    peft_forms,
    portable,
    refuse_dora,
    selected_task,
    unexportable_reason,
)
from align_ext.system.bounds import is_whole
from align_ext.system.messages import shown
from align_ext.system.tensors import digest_of, write_tensors
from align_ext.system.writing import atomic_folder


@dataclass(frozen=True)
class _SavedState:
    """Everything that is trained in a model, by names in the plain model, as full tensors on the CPU."""

    model: nn.Module
    state: AlignState
    layers: dict[str, Adapted]
    adapters: dict[str, Adapter]
    extra: ExtraTensors
    base: BaseModel
    ranks: tuple[int, ...]  # the processes that hold shards

    @classmethod
    def of(cls, model: nn.Module, what: str, gathered: Mapping[str, Tensor] | None = None) -> _SavedState:
        """Collects it from a model, or from its gathered state_dict; `what` is the calling function's name."""
        model = unwrapped(model)
        refuse_peft_layers(model)
        layers = {plain_name(model, name): layer for name, layer in adapted_layers(model).items()}
        state, extra = require_state(model), find_extra_tensors(model)
        weights = adapter_tensors({name: layer.adapter for name, layer in layers.items()})
        tensors = weights | extra.tensors
        ranks = shard_ranks(tensors.values())
        if gathered is not None and ranks:
            names = {id(tensor): key for key, tensor in model.state_dict(keep_vars=True).items()}
            lacking = next((name for name, tensor in tensors.items() if names.get(id(tensor)) not in gathered), None)
            if lacking is not None:
                raise ValueError(f"the state_dict has no {lacking}: give the whole one, or none, in every process")
            tensors, ranks = {name: gathered[names[id(tensor)]] for name, tensor in tensors.items()}, ()
        values = full_values(tensors, what)
        scaling = {name: layer.adapter.scaling for name, layer in layers.items()}
        adapters = build_adapters(state.config, {name: values[name] for name in weights}, scaling, state)
        extra = replace(extra, tensors={name: values[name] for name in extra.tensors})
        _warn_of_ranks(state, adapters)
        return cls(model, state, layers, adapters, extra, BaseModel.of(model), ranks)

    def peft_load_problem(self) -> str | None:
        """Returns why stock PEFT could not load this into the model, or None."""
        experts, modules = by_kind(self.adapters)
        keys = list(peft_keys(self.layers, experts).values())
        return peft_misreads(self.model, modules, experts, keys) or self.extra.unexportable_reason(self.model)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], task_names: Sequence[str] = ()) -> None:
    """Writes the adapters to a folder that load_adapter, and stock PEFT if its format can hold them, load bit for bit.

    If parameters are sharded (FSDP2, ZeRO-3), every process must call it; one writes, and all return when the folder is
    complete.

    Args:
        model: a model that replace_linear_with_align_lora adapted.
        folder: gets the files of the table above; other files in it stay.
        task_names: the names of tasks 0, 1, ...; they are stored, and name the folders of an adapter by task. A
            task without a name gets its number.

    Raises:
        ValueError: the model has no adapters, or also adapters of PEFT, a weight is not finite, or the names are not
            valid.
        RuntimeError: parameters are sharded, and not all processes called it.
    """
    write_adapter(model, folder, task_names)


def write_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    task_names: Sequence[str] = (),
    gathered: Mapping[str, Tensor] | None = None,
) -> None:
    """Does the work of save_adapter; gathered: the model's full state_dict, if its parameters are sharded."""
    names = checked_task_names(task_names, require_state(model).config)
    full = _SavedState.of(model, "save_adapter", gathered)
    adapters, config, extra = full.adapters, full.state.config, full.extra.tensors
    scaling = {name: adapter.scaling for name, adapter in adapters.items()}
    scaling = {} if set(scaling.values()) == {config.scaling} else scaling
    with_peft, state = full.peft_load_problem() is None, adapter_tensors(adapters)
    plain = with_peft and is_plain(adapters, config)
    record = {"options": key_options(config, scaling, names), "base": full.base.to_dict()}
    options = config.to_dict() | {"digest": digest_of(state | extra)}
    options |= ({"task_names": list(names)} if names else {}) | ({"layer_scaling": scaling} if scaling else {})
    new = atomic_folder(folder, adapter_files(folder))
    with one_writer(full.ranks) as writes, new if writes else nullcontext() as path:
        if path is None:
            return
        for subfolder, form in peft_forms(adapters, config, names, extra).items() if with_peft else ():
            _write_peft(path / subfolder, form, full, record if plain else None)
        if not plain:
            write_tensors(path / STATE, state, record)
            if extra:
                write_tensors(path / TRAINED, extra)
        write_json(path / OUR_CONFIG, options)
        _write_card(path, folder, full, names)


def export_peft(model: nn.Module, folder: str | os.PathLike[str], task: int | None = None) -> None:
    """Writes the adapter as a folder of stock PEFT without our files: for other programs, or to publish.

    If parameters are sharded, every process must call it, like save_adapter.

    Args:
        model: a model that replace_linear_with_align_lora adapted.
        folder: gets adapter_model.safetensors, adapter_config.json and the model card; other files in it stay.
        task: the task of an adapter by task; None: the task of set_task.

    Raises:
        ValueError: PEFT's format cannot hold these adapters (the message says why), other programs cannot read them
            (DoRA), a weight is not finite, or there is no such task.
        RuntimeError: parameters are sharded, and not all processes called it.
    """
    config = require_state(model).config
    refuse_dora(config)
    if task is not None:
        tasks = (config.num_tasks or 0) if config.row.by_task else 0
        if not is_whole(task, 0, tasks - 1):
            raise ValueError(f"task={shown(task)}: the model has an adapter for each of {tasks} tasks, by number")
    full = _SavedState.of(model, "export_peft")
    with nullcontext() if task is None else selected_task(full.adapters, task):
        if reason := unexportable_reason(full.adapters, config) or full.peft_load_problem():
            raise ValueError(f"PEFT has no form of this adapter: {reason}")
        form = portable(peft_form(full.adapters, config, full.extra.tensors))
    new = atomic_folder(folder, adapter_files(folder))
    with one_writer(full.ranks) as writes, new if writes else nullcontext() as path:
        if path is not None:
            _write_peft(path, form, full)
            _write_card(path, folder, full, ())


def _warn_of_ranks(state: AlignState, adapters: Mapping[str, Adapter]) -> None:
    """Warns of adalora without an allocation, unless one is under way, as in a checkpoint."""
    under_way = state.ranks is not None and not state.ranks.kept
    if not under_way and (said := ranks_above_target(adapters.values(), state.config)):
        warnings.warn(
            f"{said}, for nothing allocates them: call update_and_allocate(model, step) after each optimizer.step(), "
            "or train by AlignTrainer",
            stacklevel=4,
        )


def _write_card(path: Path, folder: str | os.PathLike[str], full: _SavedState, tasks: Sequence[str]) -> None:
    """Writes the card into the new folder, if the folder that it replaces holds none of the user's."""
    if not has_own_card(folder):
        parameters = [p for adapter in full.adapters.values() for p in adapter.parameters()]
        count = sum(p.numel() for p in (*parameters, *full.extra.tensors.values()))
        facts = CardFacts.of(full.model, full.state.config, count, tasks)
        text = facts.text(peft=(path / PEFT_CONFIG).is_file())
        (path / CARD).write_text(text, encoding="utf-8")


def _write_peft(path: Path, form: PeftForm, full: _SavedState, record: Mapping[str, Any] | None = None) -> None:
    experts, modules = by_kind(full.adapters)
    path.mkdir(parents=True, exist_ok=True)
    write_tensors(path / WEIGHTS, form.tensors, record or {"base": full.base.to_dict()})
    content = {
        "peft_type": "LORA",
        "task_type": task_type_of(full.model, full.extra.modules),
        "base_model_name_or_path": full.base.name,
        **form.options,
        "lora_dropout": 0.0 if experts else full.state.config.lora_dropout,  # PEFT has none on experts, and refuses it
        "target_modules": _target_modules(full.model, modules),
        "modules_to_save": list(full.extra.modules) or None,
        "fan_in_fan_out": all(is_transposed(layer.base_layer) for layer in full.layers.values()),
        "bias": full.extra.bias,
        "inference_mode": True,
    }
    write_json(path / PEFT_CONFIG, content)


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Returns the last parts of the names if they select exactly these layers, else the full names."""
    ends, keys = sorted({name.rpartition(".")[2] for name in names}), set(names)
    others = (n for n, _ in model.named_modules() if n.rpartition(".")[2] in ends and plain_name(model, n) not in keys)
    return ends if next(others, None) is None else names
