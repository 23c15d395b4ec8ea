"""An adapter's folder: written in one piece, read strictly, understood without the model it belongs to."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from align_ext.config import AlignLoraConfig
from align_ext.hf.adopt import PEFT_PREFIX
from align_ext.hf.beside import HEADS
from align_ext.hf.peft_form import PEFT_CONFIG, TASKS, WEIGHTS, one_lora, peft_forms, plain_lora, scaling_of
from align_ext.nn import adapter_class
from align_ext.nn.base import Adapter
from align_ext.state import AlignState

OUR_CONFIG, STATE = "align_lora_config.json", "align_lora_heads.safetensors"
TRAINED = "align_trained.safetensors"
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Our files in an adapter's folder, by their paths in it: what a new adapter replaces there.
ADAPTER_FILES = "|".join(map(re.escape, (WEIGHTS, PEFT_CONFIG, OUR_CONFIG, STATE, TRAINED)))
ADAPTER_FILES += f"|{TASKS}/[^/]+/({ADAPTER_FILES})"


@dataclass(frozen=True)
class AdapterFolder:
    """What an adapter's folder holds, checked.

    Attributes:
        path: the folder.
        config: the adapters' options.
        adapters: by module name; on the CPU, with the folder's values.
        task_names: of tasks 0, 1, ..., where they were given.
        plain: whether stock PEFT wrote it: without options of ours.
        trained: what was trained beside the adapters, by name in the plain model.
        tied: whether PEFT ties modules_to_save as the base does.
    """

    path: Path
    config: AlignLoraConfig
    adapters: dict[str, Adapter]
    task_names: tuple[str, ...]
    plain: bool
    trained: dict[str, Tensor]
    tied: bool

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> AdapterFolder:
        """Reads a folder of save_adapter or of stock PEFT.

        Raises:
            ValueError: no such folder, a damaged file, missing or unexpected keys, other shapes, values that are not
                finite, files that do not belong together, or an adapter that is no plain LoRA.
        """
        path = Path(folder)
        plain = not (path / OUR_CONFIG).is_file()
        ours = {} if plain else read_json(path / OUR_CONFIG)
        task_names, scaling = tuple(ours.pop("task_names", None) or ()), ours.pop("layer_scaling", None) or {}
        config = None if plain else _config(path / OUR_CONFIG, ours)
        tied, trained = True, dict[str, Tensor]()
        if config is not None and ((path / STATE).is_file() or not one_lora(config)):
            tensors = _read_tensors(path / STATE)
        else:
            peft, tensors, trained = _read_plain(path)
            config = config or plain_lora(path / PEFT_CONFIG, peft, _modules(tensors))
            scaling = {name: scaling_of(peft, name, r, path / PEFT_CONFIG) for name, r in _ranks(tensors).items()}
            tied = bool(peft.get("ensure_weight_tying"))
        if (path / TRAINED).is_file():
            tied, trained = True, _read_trained(path / TRAINED)
        check_tensors(trained, trained)
        adapters = _adapters(path, config, tensors, scaling)
        found = cls(path, config, adapters, task_names, plain, trained, tied)
        if not plain:
            found._check_peft_files()
        return found

    def ranks(self) -> dict[str, int]:
        """The rank of each layer."""
        return {name: adapter.r for name, adapter in self.adapters.items()}

    def state(self) -> dict[str, Tensor]:
        """All tensors, by "<module>.<parameter>"."""
        return state_of(self.adapters)

    def _check_peft_files(self) -> None:
        """The files for PEFT must say what ours say: one of them may have been replaced or edited."""
        for place, form in peft_forms(self.adapters, self.config, self.task_names, self.trained).items():
            path = self.path / place
            if not (path / WEIGHTS).is_file():
                continue  # it is for others
            peft, tensors = read_json(path / PEFT_CONFIG), _read_tensors(path / WEIGHTS)
            if "modules_to_save" not in peft:  # as versions before wrote, with what else is trained in its own file
                tensors |= {f"{PEFT_PREFIX}{name}": tensor for name, tensor in self.trained.items()}
            for option, value in form.options.items():
                if (peft.get(option) or None) != (value or None):
                    raise ValueError(
                        f"{path / PEFT_CONFIG} has {option}={peft.get(option)!r}, but {OUR_CONFIG} means {value!r}: "
                        f"one of them was edited; remove {OUR_CONFIG} and {STATE} to load the PEFT adapter alone"
                    )
            if tensors.keys() != form.tensors.keys() or any(
                tensors[key].shape != tensor.shape or not _same(tensors[key], tensor)
                for key, tensor in form.tensors.items()
            ):
                raise ValueError(
                    f"{path / WEIGHTS} is not the adapter of {STATE}: one of them was replaced; remove the one that is "
                    "out of date"
                )


def state_of(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """All tensors of adapters, by "<module>.<parameter>"."""
    return {
        f"{name}.{part}": tensor for name, adapter in adapters.items() for part, tensor in adapter.state_dict().items()
    }


def check_tensors(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], hint: str = "") -> None:
    """Compares keys, shapes and kinds of dtypes with those wanted, and checks that all values are finite.

    Raises:
        ValueError: they differ, or are not finite.
    """
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter does not fit the model: {len(missing)} keys are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}{hint}"
        )
    for key, expected in wanted.items():
        tensor = tensors[key]
        if tensor.shape != expected.shape:
            raise ValueError(f"{key} is {list(tensor.shape)}, but the model's is {list(expected.shape)}")
        if tensor.dtype not in (_FLOATS if expected.is_floating_point() else (expected.dtype,)):
            raise ValueError(f"{key} is {tensor.dtype}, but should be like {expected.dtype}")
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{key} holds values that are not finite")


def read_json(file: Path) -> dict[str, Any]:
    """Reads a JSON object; ValueError that names the file if it is none."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it holds no JSON object")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON object."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def write_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any device as safetensors.

    Raises:
        ValueError: a value is not finite.
    """
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds values that are not finite")
    content, seen = {}, set()
    for name, tensor in tensors.items():
        whole = tensor.detach().cpu().contiguous()
        content[name] = whole.clone() if whole.data_ptr() in seen else whole  # no two names share memory in a file
        seen.add(whole.data_ptr())
    save_file(content, file, metadata={"format": "pt"})


def _read_tensors(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise ValueError(f"{file.parent} is no adapter folder: {file.name} is missing")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _read_plain(path: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """A PEFT folder's options, its adapters' tensors by our keys, and those of modules_to_save."""
    tensors = _read_tensors(path / WEIGHTS)
    if not (path / PEFT_CONFIG).is_file():
        raise ValueError(f"{path} is no adapter folder: {PEFT_CONFIG} is missing")
    peft, lora, trained, odd = read_json(path / PEFT_CONFIG), {}, {}, []
    modules = peft.get("modules_to_save") or []
    if not isinstance(modules, list) or not all(isinstance(name, str) and name for name in modules):
        raise ValueError(f"{path / PEFT_CONFIG}: modules_to_save={modules!r} must be a list of names")
    found = set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        within = [module for module in modules if f"{module}." in name]
        if match := re.fullmatch(r"(.+\.lora_[AB])\.weight", name):
            lora[match[1]] = tensor
        elif name != key and within and ".lora_" not in name:
            trained[name] = tensor
            found.update(within)
        else:
            odd.append(key)
    if odd:
        raise ValueError(f"{path / WEIGHTS} is no plain LoRA: of its keys {len(odd)} are unexpected {sorted(odd)[:3]}")
    lost = [name for name in modules if name not in found and (name not in HEADS or not found)]
    if lost:
        raise ValueError(f"{path / WEIGHTS} has no tensors of modules_to_save={lost[0]!r}")
    return peft, lora, trained


def _read_trained(file: Path) -> dict[str, Tensor]:
    """What was trained beside the adapters, by name in the plain model."""
    tensors = _read_tensors(file)
    return {name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): t for name, t in tensors.items()}


def _config(file: Path, options: dict[str, Any]) -> AlignLoraConfig:
    try:
        return AlignLoraConfig.from_dict(options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _modules(tensors: Mapping[str, Tensor]) -> list[str]:
    """The modules that keys "<module>.lora_..." name, in the keys' order; other keys name themselves."""
    return list(dict.fromkeys(key.partition(".lora_")[0] for key in tensors))


def _ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    shapes = {name: tensors[f"{name}.lora_A"].shape for name in _modules(tensors) if f"{name}.lora_A" in tensors}
    return {name: shape[-2] for name, shape in shapes.items() if len(shape) >= 2}


def _adapters(
    path: Path, config: AlignLoraConfig, tensors: Mapping[str, Tensor], scaling: Mapping[str, float]
) -> dict[str, Adapter]:
    """The adapters that hold these tensors, each as its options and the sizes of its A and B make it."""
    state, ranks, adapters = AlignState(config), _ranks(tensors), {}
    for name in _modules(tensors):
        A, B = tensors.get(f"{name}.lora_A"), tensors.get(f"{name}.lora_B")
        sizes = (A.shape[-1] if A is not None and A.dim() else 1, B.shape[-2] if B is not None and B.dim() > 1 else 1)
        with torch.device("meta"):
            adapter = adapter_class(config)(replace(config, r=ranks.get(name, config.r)), *sizes)
        adapter.state, adapter.scaling = state, scaling.get(name, config.scaling)
        adapters[name] = adapter
    if not adapters:
        raise ValueError(f"{path} is no adapter folder: it holds no weights")
    check_tensors(tensors, state_of(adapters))
    for name, adapter in adapters.items():
        own = {part: tensors[f"{name}.{part}"] for part in adapter.state_dict()}
        adapter.load_state_dict(own, assign=True)
    return adapters


def _same(a: Tensor, b: Tensor) -> bool:
    """Equal but for the rounding of a sum over heads on another machine."""
    return torch.allclose(a.to(b.dtype), b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
