"""Reads an adapter's folder strictly, without the model it belongs to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters import make_adapter
from align_ext.adapters.base import Adapter
from align_ext.adapters.embedding import EmbeddingAdapter
from align_ext.alignment.model_state import AlignState
from align_ext.base_model.fingerprint import BaseModel
from align_ext.config import AlignLoraConfig
from align_ext.io.hub_adapter import local_folder
from align_ext.io.model_card import CARD, has_own_card
from align_ext.io.peft_format import (
    BY_LAYER,
    PEFT_CONFIG,
    TASKS,
    WEIGHTS,
    base_key,
    by_kind,
    check_parameters,
    check_targets,
    one_lora,
    peft_forms,
    plain_lora_config,
    scalings,
    token_indices,
)
from align_ext.io.read_peft import read_file, read_peft, read_trained
from align_ext.system.bounds import is_number
from align_ext.system.messages import shown, shown_path
from align_ext.system.names import check_names
from align_ext.system.reading import check_folder, exists, read_json
from align_ext.system.tensors import check_tensors, digest_of, write_tensors

__all__ = ["AdapterFolder", "check_tensors", "write_tensors"]

OUR_CONFIG, STATE = "align_lora_config.json", "align_lora_heads.safetensors"
TRAINED = "align_trained.safetensors"
# Options that decide what adapters hold and compute; the others (dropout, losses) may change between training runs.
_DECISIVE = (
    "r", "lora_alpha", "use_rslora", "use_dora", "num_heads", "reduce", "router", "routing", "routing_groups", "top_k",
    "router_temperature", "target_blocks", "shared_rank",
)  # fmt: skip
_LATER = {"use_dora": False, "shared_rank": None}  # decisive options that older files do not record
_ADAPTER_KEY = r"(.+?)(\.lora_router\.lora_[RH]|\.lora_\w+)"  # the name of a module, and of a tensor of its adapter
_NAMES = (PEFT_CONFIG, WEIGHTS, OUR_CONFIG, STATE, TRAINED)
_FILES = "|".join(map(re.escape, _NAMES))


@dataclass(frozen=True)
class AdapterFolder:
    """The checked content of an adapter's folder.

    Attributes:
        path: the folder.
        config: the adapters' options.
        adapters: the adapters by module name, on the CPU, with the folder's values.
        task_names: the names of tasks 0, 1, ..., if they were given.
        peft: the content of adapter_config.json; empty if there is no such file.
        plain: whether stock PEFT wrote the folder, so that it has none of our options.
        trained: the tensors that were trained beside the adapters, by name in the plain model.
        written: weights of the base that stock PEFT wrote too, which must be the model's.
        tied: whether PEFT ties modules_to_save as the base does.
        base: the base model it belongs to; None if none is recorded, as in a folder of stock PEFT.
    """

    path: Path
    config: AlignLoraConfig
    adapters: dict[str, Adapter]
    task_names: tuple[str, ...]
    peft: Mapping[str, Any]
    plain: bool
    trained: dict[str, Tensor]
    written: dict[str, Tensor]
    tied: bool
    base: BaseModel | None

    @classmethod
    def read(cls, folder: str | os.PathLike[str], revision: str | None = None) -> AdapterFolder:
        """Reads a folder of save_adapter or of stock PEFT, or such a repository of the hub (hub_adapter.py).

        Raises:
            ValueError: no such folder or repository, a damaged or edited file, missing or unexpected keys, wrong
                shapes, values that are not finite, files that do not belong together, invalid names, or a PEFT adapter
                that is not plain LoRA.
        """
        path = local_folder(folder, [*_NAMES, *(f"{TASKS}/*/{name}" for name in _NAMES)], revision)
        plain = not exists(path / OUR_CONFIG)
        if plain and exists(path / STATE):
            raise ValueError(
                f"{shown_path(path)} is no adapter folder: {OUR_CONFIG} is missing, to which {STATE} belongs"
            )
        ours = {} if plain else read_json(path / OUR_CONFIG)
        task_names, scaling, digest = (ours.pop(name, None) for name in ("task_names", "layer_scaling", "digest"))
        config = None if plain else _config(path / OUR_CONFIG, ours)
        peft = read_json(path / PEFT_CONFIG) if exists(path / PEFT_CONFIG) else {}
        if config is not None and (exists(path / STATE) or not one_lora(config)):
            file, trained = path / STATE, dict[str, Tensor]()
            tensors, record = read_file(file)
            written = {}
        else:
            file = path / WEIGHTS
            content = read_peft(path, peft)
            tensors, trained, written, record = content.lora, content.trained, content.base, content.record
            experts = [name for name in _module_names(tensors) if _is_of_experts(tensors, name)]
            modules = [name for name in _module_names(tensors) if name not in set(experts)]
            config = config or plain_lora_config(path / PEFT_CONFIG, peft, modules, experts)
        in_peft = bool(trained) or not exists(path / TRAINED)
        trained |= {} if in_peft else read_trained(path / TRAINED)
        check_tensors(trained, trained)
        if plain:
            check_targets(path / PEFT_CONFIG, peft, modules)
            factors = scalings(path / PEFT_CONFIG, peft, _ranks(tensors))
        else:
            factors = _checked_scaling(path / OUR_CONFIG, scaling, _module_names(tensors))
        names = checked_task_names([] if task_names is None else task_names, config)
        adapters = build_adapters(config, tensors, factors)
        if not adapters:
            raise ValueError(f"{shown_path(path)} is no adapter folder: it holds no weights")
        if digest not in (None, digest_of(tensors | trained)):
            raise ValueError(
                f"{shown_path(file)} holds other tensors than {OUR_CONFIG} was written for: one was replaced"
            )
        if not plain:
            _check_options(path / OUR_CONFIG, file, record.get("options"), key_options(config, factors, names))
        base = None if record.get("base") is None else BaseModel.from_dict(record["base"])
        tied = bool(peft.get("ensure_weight_tying")) if in_peft and trained else True
        contents = cls(path, config, adapters, names, peft, plain, trained, written, tied, base)
        if not plain:
            contents._check_peft_files()
        return contents

    @property
    def base_name(self) -> str | None:
        """The recorded name of the base model, or None."""
        name = self.peft.get("base_model_name_or_path") if self.base is None else self.base.name
        return name if isinstance(name, str) and name else None

    def ranks(self) -> dict[str, int]:
        """Returns the rank of each layer."""
        return {name: adapter.r for name, adapter in self.adapters.items()}

    def state(self) -> dict[str, Tensor]:
        """Returns all tensors by "<module>.<parameter>"."""
        return adapter_tensors(self.adapters)

    def check_model(
        self,
        model: nn.Module,
        layers: Iterable[str],
        experts: Iterable[str] = (),
        replaced: Mapping[str, Sequence[int]] = MappingProxyType({}),
        *,
        force: bool = False,
    ) -> None:
        """Checks that the folder belongs to a model.

        Args:
            model: the model.
            layers: the names of its linear layers.
            experts: the names of its tensors of experts.
            replaced: the rows of weights whose values the folder replaces, by the weights' names.
            force: accept another base model.

        Raises:
            ValueError: it is another base model, or target_modules in a folder of stock PEFT name a layer without
                weights in the folder.
        """
        if self.base is not None and not force:
            self.base.check(model, replaced=replaced)
        if self.plain:
            of_experts, others = by_kind(self.adapters)
            check_targets(self.path / PEFT_CONFIG, self.peft, others, layers)
            check_parameters(self.path / PEFT_CONFIG, self.peft, of_experts, experts)

    def _check_peft_files(self) -> None:
        """Checks that the files for PEFT agree with ours, since one of them may have been replaced or edited."""
        for where, form in peft_forms(self.adapters, self.config, self.task_names, self.trained).items():
            path = self.path / where
            if not exists(path / WEIGHTS):
                continue  # the folder has no files for PEFT
            peft, tensors = {"bias": "none"} | read_json(path / PEFT_CONFIG), read_file(path / WEIGHTS)[0]
            biased = any(f".{name}".endswith(".bias") for name in self.trained)
            if "modules_to_save" not in peft:  # older versions wrote the other trained tensors to a separate file
                tensors |= {base_key(name, self.adapters): tensor for name, tensor in self.trained.items()}
            experts, layers = by_kind(self.adapters)
            plain_lora_config(path / PEFT_CONFIG, peft, layers, experts)
            bias = {} if biased else {"bias": "none"}
            for option, value in {**dict.fromkeys(BY_LAYER), **bias, **form.options}.items():
                if (peft.get(option) or None) != (value or None):
                    raise ValueError(
                        f"{shown_path(path / PEFT_CONFIG)} has {option}={shown(peft.get(option))}, but {OUR_CONFIG} "
                        f"means {shown(value)}: one of them was edited; remove {OUR_CONFIG} and {STATE} to load the "
                        "PEFT adapter alone"
                    )
            check_targets(path / PEFT_CONFIG, peft, layers)
            if tensors.keys() != form.tensors.keys() or any(
                tensors[key].shape != tensor.shape or not _is_close(tensors[key], tensor)
                for key, tensor in form.tensors.items()
            ):
                raise ValueError(
                    f"{shown_path(path / WEIGHTS)} is not the adapter of {STATE}: one of them was replaced; remove the "
                    "one that is out of date"
                )


def key_options(
    config: AlignLoraConfig, scaling: Mapping[str, float] | None = None, task_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Returns the options that decide what adapters hold and compute, in a form that can be compared."""
    architecture, multi = config.architecture, config.row.by_task
    start, offset = config.init_lora_weights, config.init_lora_weights in ("pissa", "random_heads", "nystrom")
    options = {option: getattr(config, option) for option in _DECISIVE}
    return {
        "architecture": "lora" if architecture == "align_lora" else architecture,
        **{option: list(value) if isinstance(value, tuple) else value for option, value in options.items()},
        "init_lora_weights": start if offset else "no offset",
        "spectral": "paper" if config.spectral == "paper" else "no projectors",
        "num_tasks": config.num_tasks if multi else None,
        "layer_scaling": dict(scaling or {}),
        "task_names": list(task_names) if multi else [],
        **({"trainable_token_indices": rows} if (rows := token_indices(config)) else {}),
    }


def checked_task_names(names: Any, config: AlignLoraConfig) -> tuple[str, ...]:
    """Returns the names of tasks 0, 1, ...: none, or one per task; a task without a name gets its number as name.

    Raises:
        ValueError: they are invalid, are more than the tasks, or cannot name the folders of an adapter by task.
    """
    checked = check_names(names, "task_names", for_folders=config.row.by_task)
    tasks = config.num_tasks or len(checked)
    if len(checked) > tasks:
        raise ValueError(f"task_names={shown(list(checked))} are {len(checked)}, but num_tasks={tasks}")
    rest = tuple(map(str, range(len(checked), tasks))) if checked else ()
    if clash := set(checked).intersection(rest):
        number = min(clash)
        raise ValueError(f"task_names: {number!r} names task {checked.index(number)}, and task {number}, which has no "
                         f"name, is called so too: name all {tasks} tasks")  # fmt: skip
    return checked + rest


def adapter_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Returns all parameters and buffers of adapters by "<module>.<parameter>"."""
    named = {name: adapter.state_dict(keep_vars=True) for name, adapter in adapters.items()}
    return {f"{name}.{part}": tensor for name, current in named.items() for part, tensor in current.items()}


def build_adapters(
    config: AlignLoraConfig,
    tensors: Mapping[str, Tensor],
    scaling: Mapping[str, float],
    state: AlignState | None = None,
) -> dict[str, Adapter]:
    """Builds the adapters that hold these tensors; the sizes of A and B give the sizes of the layers.

    Args:
        config: the options of the adapters.
        tensors: the tensors by "<module>.<parameter>".
        scaling: the scaling by module, where it differs from that of the options.
        state: the state of their model; None: a new one.

    Raises:
        ValueError: tensors are missing, unexpected, of wrong shapes or not finite.
    """
    state, ranks, adapters = state or AlignState(config), _ranks(tensors), {}
    for name in _module_names(tensors):
        A, B = (_factor(tensors, name, part) for part in "AB")
        sizes = (A.shape[-1] if A is not None and A.dim() else 1, B.shape[-2] if B is not None and B.dim() > 1 else 1)
        part: tuple[int, ...] = ()
        if A is not None and _is_of_experts(tensors, name):
            if config.row.mixture:
                R = tensors.get(f"{name}.lora_router.lora_R")
                part = (0, False) if R is None or not R.dim() else (R.shape[-1], True)
            elif one_lora(config):
                part = (len(A),)
        with torch.device("meta"):
            options = replace(config, r=ranks.get(name, config.r))
            is_embedding = f"{name}.lora_embedding_A" in tensors
            adapter: Adapter = (
                EmbeddingAdapter(options, *sizes) if is_embedding else make_adapter(options, *sizes, *part)
            )
        adapter.state, adapter.scaling = state, scaling.get(name, config.scaling)
        adapters[name] = adapter
    check_tensors(tensors, adapter_tensors(adapters))
    for name, adapter in adapters.items():
        current = {part: tensors[f"{name}.{part}"] for part in adapter.state_dict()}
        adapter.load_state_dict(current, assign=True)
    return adapters


def adapter_files(folder: str | os.PathLike[str]) -> str:
    """Returns a regular expression for the paths of our files in an adapter's folder, which a new adapter replaces."""
    check_folder(folder)
    return rf"{_FILES}|{TASKS}/[^/]+/({_FILES})" + f"|{re.escape(CARD)}" * (not has_own_card(folder))


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _config(file: Path, options: dict[str, Any]) -> AlignLoraConfig:
    try:
        return AlignLoraConfig.from_dict(options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shown_path(file)}: {error}") from error


def _check_options(config: Path, file: Path, recorded: Any, current: Mapping[str, Any]) -> None:
    """Raises if the weights were saved with other options; recorded: None for files without options (version 0.1.0)."""
    recorded = current if recorded is None else recorded
    recorded = _LATER | recorded if isinstance(recorded, dict) else recorded
    for option, value in current.items():
        meant = recorded.get(option, "nothing") if isinstance(recorded, dict) else "nothing"
        if meant != value:
            raise ValueError(
                f"{shown_path(config)} has {option}={shown(value)}, but {file.name} means {shown(meant)}: one of them "
                "was edited"
            )


def _checked_scaling(file: Path, scaling: Any, modules: Sequence[str]) -> dict[str, float]:
    """Returns the scaling of each layer; empty if all have the scaling of the options."""
    if scaling is None:
        return {}
    if not isinstance(scaling, dict) or not all(map(is_number, scaling.values())) or scaling.keys() != set(modules):
        raise ValueError(f"{shown_path(file)} has layer_scaling={shown(scaling)}, which is no number for each layer")
    return scaling


def _module_names(tensors: Mapping[str, Tensor]) -> list[str]:
    """Returns the modules of keys "<module>.lora_...", in the keys' order; any other key is returned itself."""
    matches = {key: re.fullmatch(_ADAPTER_KEY, key) for key in tensors}
    return list(dict.fromkeys(match[1] if match else key for key, match in matches.items()))


def _is_of_experts(tensors: Mapping[str, Tensor], name: str) -> bool:
    """Whether a LoRA's tensors are those of experts, [E, r, n] and [E, m, r]."""
    return f"{name}.lora_A" in tensors and tensors[f"{name}.lora_A"].dim() == 3


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    factors = {name: _factor(tensors, name, "B") for name in _module_names(tensors)}
    return {name: B.shape[-1] for name, B in factors.items() if B is not None and B.dim() >= 2}


def _factor(tensors: Mapping[str, Tensor], name: str, part: str) -> Tensor | None:
    """Returns A or B of a layer, or of an embedding."""
    return tensors.get(f"{name}.lora_{part}", tensors.get(f"{name}.lora_embedding_{part}"))


def _is_close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors are equal up to the rounding of a sum over heads on another machine."""
    return torch.allclose(a.to(b.dtype), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


def task_number(stored: AdapterFolder, task: str | None) -> int | None:
    """Returns the number of a task that is given by name or number; None if no task is given.

    Raises:
        ValueError: there is no such task, or the adapter is the same for all tasks.
    """
    if task is None:
        return None
    if not stored.config.row.by_task:
        raise ValueError(f"--task {task}: {stored.config.architecture} is one adapter for all tasks")
    if task in stored.task_names:
        return stored.task_names.index(task)
    if task.isdecimal() and int(task) < (stored.config.num_tasks or 0):
        return int(task)
    raise ValueError(f"--task {task}: there is no such task ({task_list(stored)})")


def task_list(stored: AdapterFolder) -> str:
    return ", ".join(stored.task_names) or f"0 .. {(stored.config.num_tasks or 0) - 1}"
