"""PEFT's form of AdaLoRA: lora_A, lora_E and lora_B of each layer, and the schedule in adapter_config.json.

PEFT scales by lora_alpha / (init_r + 1e-5) and an adapter here by lora_alpha / r, so that their lora_alpha differ by
that. Once PEFT has allocated ranks, its files hold the triplets that are left, and rank_pattern says which of init_r
these are; the others are read as zeros, which is the same product.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from align_ext.adapters.base import Adapter
from align_ext.base_model.adopt_peft import PEFT_PREFIX
from align_ext.config import AlignLoraConfig
from align_ext.system.bounds import is_number, is_whole
from align_ext.system.messages import shown

ADALORA = "ADALORA"  # peft_type
# Its options in adapter_config.json that plain LoRA has not, with PEFT's defaults.
OPTIONS: Mapping[str, Any] = {
    "target_r": 8, "init_r": 12, "tinit": 0, "tfinal": 0, "deltaT": 1, "beta1": 0.85, "beta2": 0.85,
    "orth_reg_weight": 0.5, "total_step": None,
}  # fmt: skip
_PARTS = ("lora_A", "lora_E", "lora_B")
_ADDED = 1e-5  # to the rank that PEFT divides by


def form_of(adapters: Mapping[str, Adapter], config: AlignLoraConfig) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of adapters by PEFT's keys, and PEFT's options.

    PEFT asks for a schedule whatever the folder is for: one that the options leave to the Trainer is one step.
    """
    tensors = {
        f"{PEFT_PREFIX}{name}.{part}": getattr(adapter, part).detach()
        for name, adapter in adapters.items()
        for part in _PARTS
    }
    given = {name: getattr(config, name) for name in OPTIONS}
    schedule = {"total_step": 1, "tinit": 0, "tfinal": 0} if config.total_step is None else {}
    alpha = config.scaling * (config.r + _ADDED)
    own = {"peft_type": ADALORA, "init_r": config.r, "target_r": config.final_rank, "lora_alpha": alpha}
    given = {name: OPTIONS[name] if value is None else value for name, value in given.items()}
    return tensors, given | schedule | own


def options_of(peft: Mapping[str, Any]) -> dict[str, Any]:
    """Returns our options of a folder's that plain LoRA has not, and lora_alpha.

    Raises:
        ValueError: init_r or lora_alpha is no number.
    """
    options = {name: peft.get(name, default) for name, default in OPTIONS.items()}
    r, alpha = options["init_r"], peft.get("lora_alpha", 8)
    if not is_whole(r) or not is_number(alpha):
        raise ValueError(f"init_r={shown(r)} and lora_alpha={shown(alpha)} are to be numbers of at least 1")
    return options | {"architecture": "adalora", "lora_alpha": alpha * r / (r + _ADDED)}


def restored(lora: Mapping[str, Tensor], peft: Mapping[str, Any]) -> dict[str, Tensor]:
    """Returns tensors "<module>.lora_A" of PEFT with all of init_r triplets, those that were pruned as zeros.

    Raises:
        ValueError: rank_pattern does not fit the tensors, or a layer has neither init_r triplets nor a pattern.
    """
    r, patterns = peft.get("init_r", OPTIONS["init_r"]), peft.get("rank_pattern") or {}
    kept = {key.rpartition(".")[0]: mask for key, mask in patterns.items()} if isinstance(patterns, dict) else {}
    result = {}
    for key, tensor in lora.items():
        module, _, part = key.rpartition(".")
        mask, dim = kept.get(module, [True] * r), int(part == "lora_B")
        fits = part in _PARTS and tensor.dim() == 2 and isinstance(mask, list) and len(mask) == r
        if not fits or not all(isinstance(one, bool) for one in mask) or sum(mask) != tensor.shape[dim]:
            raise ValueError(f"{key} {shown(list(tensor.shape))} does not fit init_r={shown(r)} and its rank_pattern")
        full = tensor.new_zeros((r, tensor.shape[1]) if dim == 0 else (tensor.shape[0], r))
        result[key] = full.index_copy(dim, torch.tensor(mask).nonzero().flatten(), tensor)
    return result
