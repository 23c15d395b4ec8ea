"""Adapters in and out: a PEFT folder (safetensors only), strict loading, merging, removing."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from align_ext.batch import AlignState, find_state
from align_ext.config import AlignLoraConfig
from align_ext.hf.adopt import PEFT_PREFIX
from align_ext.hf.replace import Adapted, adapt, adapted_layers
from align_ext.hooks import remove_hooks
from align_ext.nn.base import AdaptedLinear, is_conv1d
from align_ext.nn.lora import LoraAdapter

WEIGHTS, PEFT_CONFIG, OUR_CONFIG = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "align_lora_config.json",
)


@contextmanager
def atomic_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """A new folder beside the target that takes its place when the block ends well, and vanishes otherwise."""
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file, not a folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if target.exists():
            for item in temporary.iterdir():
                os.replace(item, target / item.name)
        else:
            temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def save_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Writes the adapter as a PEFT folder, which stock PEFT loads with the same logits.

    Args:
        model: adapted by replace_linear_with_align_lora.
        folder: gets adapter_model.safetensors, adapter_config.json and align_lora_config.json; written atomically.

    Raises:
        ValueError: the model has no adapters, or a weight is not finite.
    """
    layers, state = adapted_layers(model), _state(model)
    adapters = {name: layer.adapter for name, layer in layers.items()}
    uniform = all(a.r == state.config.r and a.scaling == state.config.scaling for a in adapters.values())
    tensors, ranks = {}, {}
    for name, layer in adapters.items():
        assert isinstance(layer, LoraAdapter)
        name = _plain_name(name)
        # Ranks or scalings that differ between layers (an adopted adapter): the scaling goes into B, alpha = r.
        B = layer.lora_B * (1.0 if uniform else layer.scaling)
        for part, weight in (("lora_A", layer.lora_A), ("lora_B", B)):
            tensors[f"{PEFT_PREFIX}{name}.{part}.weight"] = (
                _finite(weight.detach(), f"{name}.{part}").cpu().contiguous()
            )
        ranks[name] = layer.r
    options = state.config.to_dict()
    with atomic_folder(folder) as path:
        save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})
        _write_json(path / PEFT_CONFIG, _peft_config(model, state.config, layers, None if uniform else ranks))
        _write_json(path / OUR_CONFIG, options)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Loads an adapter folder written by save_adapter, strictly.

    Args:
        model: a plain model, which is adapted first as the folder says, or one with adapters of the same kind.
        folder: the folder.

    Returns:
        The model.

    Raises:
        ValueError: missing or unexpected keys, other shapes, weights that are not finite, or no such folder.
    """
    path = Path(folder)
    for name in (WEIGHTS, PEFT_CONFIG):
        if not (path / name).is_file():
            raise ValueError(f"{path} is no adapter folder: {name} is missing")
    try:
        tensors = load_file(path / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"{path / WEIGHTS} is damaged: {error}") from error
    peft = json.loads((path / PEFT_CONFIG).read_text())
    if find_state(model) is not None:
        return _load(model, tensors, peft)
    adapt(model, _config_of(path), peft.get("rank_pattern"))
    try:
        return _load(model, tensors, peft)
    except ValueError:
        unload(model)
        raise


def _load(model: nn.Module, tensors: dict[str, Tensor], peft: dict[str, Any]) -> nn.Module:
    layers = adapted_layers(model)
    wanted: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        for part in ("lora_A", "lora_B"):
            wanted[f"{PEFT_PREFIX}{_plain_name(name)}.{part}.weight"] = getattr(layer.adapter, part)
    _check_tensors(tensors, wanted)
    with torch.no_grad():
        for key, parameter in wanted.items():
            parameter.copy_(tensors[key])
    scaling = peft["lora_alpha"] / (peft["r"] ** 0.5 if peft.get("use_rslora") else peft["r"])
    folded = peft.get("rank_pattern") or {}  # these layers' scaling is in B
    for name, layer in layers.items():
        layer.adapter.scaling = 1.0 if _plain_name(name) in folded else scaling
    return model


def merge_and_unload(model: nn.Module) -> nn.Module:
    """Merges each adapter into its base weight, W + s B A in float32, and puts the base layers back.

    Raises:
        ValueError: a layer cannot be merged; nothing was changed then, and the message says which and why.
    """
    layers = adapted_layers(model)
    for name, layer in layers.items():
        if reason := layer.cannot_merge():
            raise ValueError(f"{name} cannot be merged: {reason}")
    return _put_back(model, {name: layer.merged_base() for name, layer in layers.items()})


def unload(model: nn.Module) -> nn.Module:
    """Removes the adapters: the model computes what its base computes. Parameters stay frozen."""
    return _put_back(model, {name: layer.base_layer for name, layer in adapted_layers(model).items()})


def _put_back(model: nn.Module, bases: dict[str, nn.Module]) -> nn.Module:
    for name, base in bases.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    remove_hooks(model)
    del model.align_report
    model.__dict__.pop("save_pretrained", None)  # an adopted PeftModel's
    return model


def _state(model: nn.Module) -> AlignState:
    state: Any = model.align_state
    return state


def _plain_name(name: str) -> str:
    """A module name without the PeftModel around an adopted model."""
    return name.removeprefix(PEFT_PREFIX)


def _finite(weight: Tensor, name: str) -> Tensor:
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} holds values that are not finite")
    return weight


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _peft_config(
    model: nn.Module, config: AlignLoraConfig, layers: Mapping[str, Adapted], ranks: dict[str, int] | None
) -> dict[str, Any]:
    """The adapter_config.json of a plain LoRA adapter; ranks, where they differ, with the scaling folded into B."""
    names = [_plain_name(name) for name in layers]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if hasattr(model, "generate") else None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "use_rslora": config.use_rslora,
        "target_modules": _target_modules(model, names),
        "fan_in_fan_out": all(is_conv1d(layer.base_layer) for layer in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }
    if ranks is not None:
        r = max(ranks.values())
        content |= {
            "r": r,
            "lora_alpha": r,
            "use_rslora": False,
            "rank_pattern": ranks,
            "alpha_pattern": ranks,
        }
    return content


def _target_modules(model: nn.Module, names: list[str]) -> list[str]:
    """Last parts of the names where they select the same layers, full names otherwise."""
    kinds = sorted({name.rpartition(".")[2] for name in names})
    others = [n for n, m in model.named_modules() if n.rpartition(".")[2] in kinds and not isinstance(m, AdaptedLinear)]
    return names if others else kinds


def _config_of(path: Path) -> AlignLoraConfig:
    """Our own options where the folder has them, PEFT's otherwise (then without alignment)."""
    if (path / OUR_CONFIG).is_file():
        return AlignLoraConfig.from_dict(json.loads((path / OUR_CONFIG).read_text()))
    peft = json.loads((path / PEFT_CONFIG).read_text())
    for option in ("use_dora", "lora_bias", "modules_to_save", "rank_pattern", "alpha_pattern"):
        if peft.get(option):
            raise ValueError(f"{path / PEFT_CONFIG}: {option}={peft[option]!r} is not plain LoRA")
    names = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")
    return AlignLoraConfig(architecture="lora", **{name: peft[name] for name in names if peft.get(name) is not None})


def _check_tensors(tensors: dict[str, Tensor], wanted: dict[str, nn.Parameter]) -> None:
    missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
    if missing or unexpected:
        raise ValueError(
            f"the adapter does not fit the model: {len(missing)} keys are missing {missing[:3]}, "
            f"{len(unexpected)} are unexpected {unexpected[:3]}"
        )
    for key, parameter in wanted.items():
        if tensors[key].shape != parameter.shape:
            raise ValueError(f"{key} is {list(tensors[key].shape)}, but the model's is {list(parameter.shape)}")
        _finite(tensors[key], key)
