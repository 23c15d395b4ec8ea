"""Reads the tensors of a folder of PEFT's form: the adapters', and those that were trained beside them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_ext.adapters.adapted_experts import EXPERT_TENSORS
from align_ext.base_model.adopt_peft import PEFT_PREFIX
from align_ext.base_model.modules_to_save import HEADS, ROWS
from align_ext.io.peft_adalora import ADALORA, restored
from align_ext.io.peft_experts import is_named, unflattened
from align_ext.io.peft_format import PEFT_CONFIG, WEIGHTS, is_target, rank_of
from align_ext.system.bounds import is_whole
from align_ext.system.messages import reason_of, shown, shown_path
from align_ext.system.names import Matcher, check_names
from align_ext.system.reading import exists
from align_ext.system.tensors import read_tensors

_LORA_KEY = r"(.+\.lora_[AB])\.weight|(.+)\.lora_B\.bias|(.+\.lora_embedding_[AB]|.+\.lora_magnitude_vector)"
_ADALORA_KEY = r"(.+\.lora_[ABE])"
_BASE_WEIGHT = r"((?!.*\.lora_).+?)(?:\.token_adapter)?(?:\.base_layer)?\.weight"


def read_file(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of a file, and what it records beside them; a missing file is an error."""
    if not exists(file):
        inside = file.parent / "adapter"  # of a run
        there = f"; {shown_path(inside)} is one" * exists(inside / file.name)
        raise ValueError(f"{shown_path(file.parent)} is no adapter folder: {file.name} is missing{there}")
    return read_tensors(file)


@dataclass(frozen=True)
class PeftTensors:
    """The tensors of a PEFT folder.

    Attributes:
        lora: the adapters', by our keys.
        trained: those that were trained beside them, by name in the plain model.
        base: weights of the base that PEFT writes too (save_embedding_layers), by name in the plain model.
        record: what is recorded beside the tensors.
    """

    lora: dict[str, Tensor]
    trained: dict[str, Tensor]
    base: dict[str, Tensor]
    record: dict[str, Any]


def read_peft(path: Path, peft: Mapping[str, Any]) -> PeftTensors:
    """Reads the tensors of a PEFT folder, of which peft is the content of adapter_config.json."""
    tensors, record = read_file(path / WEIGHTS)
    if not peft:
        raise ValueError(f"{shown_path(path)} is no adapter folder: {PEFT_CONFIG} is missing")
    adalora = peft.get("peft_type") == ADALORA
    modules, bias = peft.get("modules_to_save") or [], peft.get("bias", "none") != "none"
    if isinstance(modules, list) and all(isinstance(module, str) for module in modules):
        modules = list(dict.fromkeys(modules))  # PEFT adds the names of heads again when it writes what it has read
    check_names(modules, f"{shown_path(path / PEFT_CONFIG)}: modules_to_save")
    lora, trained, base, unknown, contents = {}, {}, dict[str, Tensor](), [], set()
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        owners = [module for module in modules if f"{module}." in name]
        match = re.fullmatch(_ADALORA_KEY if adalora else _LORA_KEY, name)
        if name != key and match:
            lora[match[1] or match[3] or f"{match[2]}.lora_bias"] = tensor
        elif name != key and peft.get("trainable_token_indices") and name.endswith(f".{ROWS}"):
            trained[name] = tensor
        elif bias and owners and re.search(r"\.(modules_to_save|original_module)\.(.+\.)?bias$", name):
            continue  # bias="all" writes the biases of modules_to_save again
        elif name != key and owners and ".lora_" not in name:
            trained[name] = tensor
            contents.update(owners)
        elif name != key and bias and ".lora_" not in name and f".{name}".endswith(".bias"):
            trained[name.replace(".base_layer.bias", ".bias")] = tensor
        elif name != key and re.fullmatch(_BASE_WEIGHT, name):
            base[re.sub(_BASE_WEIGHT, r"\1.weight", name)] = tensor
        else:
            unknown.append(key)
    file, dora = shown_path(path / WEIGHTS), any(key.endswith(".lora_magnitude_vector") for key in lora)
    if dora != bool(peft.get("use_dora")):
        raise ValueError(
            f"{shown_path(path / PEFT_CONFIG)} has use_dora={shown(peft.get('use_dora'))}, but {WEIGHTS} holds "
            f"{'' if dora else 'no '}lora_magnitude_vector of DoRA: one of them was edited"
        )
    if peft.get("ensure_weight_tying"):  # PEFT then also writes a tied tensor under its other names
        tied_copies = {n for n, tied in base.items() if any(torch.equal(tied, tensor) for tensor in trained.values())}
        trained |= {name: base.pop(name) for name in tied_copies}
    if unknown:
        keys = f"of its keys {len(unknown)} are unexpected {shown(sorted(unknown)[:3])}"
        raise ValueError(f"{file} is no plain LoRA: {keys}")
    empty = [name for name in modules if name not in contents and (name not in HEADS or not contents)]
    if empty:
        raise ValueError(f"{file} has no tensors of modules_to_save={shown(empty[0])}")
    if adalora:
        try:
            return PeftTensors(restored(lora, peft), trained, base, record)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{file}: {reason_of(error)}") from error
    return PeftTensors(_by_tensor(path, peft, lora), trained, base, record)


def _by_tensor(path: Path, peft: Mapping[str, Any], lora: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors "<module>.lora_A" of PEFT with those of experts as "<experts>.<tensor>.lora_A", [E, r, n].

    Raises:
        ValueError: there are tensors of more or fewer parameters than target_parameters names, or of other sizes.
    """
    file, matcher = path / PEFT_CONFIG, Matcher()
    targets = check_names(peft.get("target_parameters") or [], f"{shown_path(file)}: target_parameters")
    wrappers: dict[str, list[str]] = {}  # by module: its wrappers, as many as it has adapted tensors
    for key in lora if targets else ():
        wrapper = key.rpartition(".")[0]
        module = re.sub(r"(\.base_layer)*$", "", wrapper)
        if wrapper not in wrappers.get(module, []) and not (
            peft.get("target_modules") and is_target(matcher, peft, module)
        ):
            wrappers.setdefault(module, []).append(wrapper)
    result = dict(lora)
    for module, of_module in wrappers.items():
        named = [f"{module}.{tensor}" for tensor in EXPERT_TENSORS if is_named(f"{module}.{tensor}", targets)]
        if len(named) != len(of_module):
            raise ValueError(
                f"{shown_path(path / WEIGHTS)} holds adapters of {len(of_module)} parameters of {module}, of which "
                f"target_parameters={shown(list(targets))} names {len(named)} tensors of experts: it is of another kind"
            )
        for name, wrapper in zip(named, sorted(of_module, key=len, reverse=True), strict=True):
            A, B = (result.pop(f"{wrapper}.lora_{part}", torch.empty(0)) for part in "AB")
            r = rank_of(matcher, peft, name)
            fits = A.dim() == B.dim() == 2 and len(A) == B.shape[1] and is_whole(r, 1, len(A))
            if not fits or len(A) % r:
                raise ValueError(f"{shown_path(path / WEIGHTS)} has no lora_A and lora_B of rank {shown(r)} of {name}")
            result[f"{name}.lora_A"], result[f"{name}.lora_B"] = unflattened(A, B, r)
    return result


def read_trained(file: Path) -> dict[str, Tensor]:
    """Reads the tensors that were trained beside the adapters, by name in the plain model."""
    tensors, _ = read_file(file)
    return {name.removeprefix(PEFT_PREFIX).replace(".base_layer.", "."): t for name, t in tensors.items()}
