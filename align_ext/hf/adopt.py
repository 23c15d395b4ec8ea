"""Takes over the LoRA layers of a PeftModel: the same Parameters, the same scaling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn

from align_ext.config import AlignLoraConfig
from align_ext.nn.base import AdaptedLinear, features_of
from align_ext.nn.lora import LoraAdapter

PEFT_PREFIX = "base_model.model."  # PEFT's name for the plain model inside a PeftModel


def is_peft_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA layers."""
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def unfit_peft(module: Any) -> str | None:
    """Why a PEFT LoRA layer cannot be adopted, or None."""
    if len(module.active_adapters) != 1:
        return f"it has {len(module.active_adapters)} active PEFT adapters, and one can be adopted"
    adapter = module.active_adapters[0]
    if module.merged:
        return "its PEFT adapter is merged: unmerge it first"
    if adapter not in module.lora_A or not isinstance(module.lora_A[adapter], nn.Linear):
        return "its PEFT adapter is not one of linear layers"
    if module.use_dora.get(adapter) or getattr(module, "lora_variant", {}).get(adapter) is not None:
        return "its PEFT adapter is a variant (DoRA, ...) that plain LoRA cannot take over"
    if module.lora_B[adapter].bias is not None:
        return "its PEFT adapter has lora_bias, which plain LoRA cannot take over"
    return None


def refuse_other_training(model: nn.Module, targets: Mapping[str, Any]) -> None:
    """Raises if the PeftModel trains anything that would be frozen and lost by adopting only its LoRA layers."""
    kept = {id(p) for module in targets.values() for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in kept:
            raise ValueError(
                f"the PeftModel also trains {name}, which is no adopted LoRA layer: adopting would freeze it; remove "
                "it (modules_to_save, a second adapter, DoRA) from the PEFT configuration, or freeze it first"
            )


def refuse_save_pretrained(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands for save_pretrained of an adopted PeftModel, which would find no adapter to write."""
    raise RuntimeError("this PeftModel's adapter was adopted by align_ext: write it with align_ext.save_adapter")


def adopted_config(config: AlignLoraConfig, targets: Mapping[str, Any]) -> AlignLoraConfig:
    """The options with rank, scaling, dropout and layers of the PEFT adapter.

    Raises:
        ValueError: the architecture is none that a plain LoRA adapter can be.
    """
    if config.architecture not in ("lora", "align_lora") or config.target_blocks:
        raise ValueError(
            f"architecture={config.architecture!r}, target_blocks={config.target_blocks!r}: a PEFT adapter is one LoRA "
            "a layer, adopted as lora or align_lora"
        )
    module = next(iter(targets.values()))
    adapter = module.active_adapters[0]
    r = module.lora_A[adapter].weight.shape[0]
    return replace(
        config,
        r=r,
        lora_alpha=module.scaling[adapter] * r,
        use_rslora=False,
        lora_dropout=getattr(module.lora_dropout[adapter], "p", 0.0),
        target_modules=tuple(name.removeprefix(PEFT_PREFIX) for name in targets),
        target_blocks=(),
        init_lora_weights="kaiming",
    )


def adopt(module: Any, config: AlignLoraConfig) -> AdaptedLinear:
    """Takes over a PEFT LoRA layer: its base layer, its Parameters themselves, its scaling and dropout."""
    name = module.active_adapters[0]
    A, B = module.lora_A[name].weight, module.lora_B[name].weight
    with torch.device("meta"):
        adapter = LoraAdapter(replace(config, r=A.shape[0]), *features_of(module.base_layer))
    adapter.lora_A, adapter.lora_B = A, B
    adapter.scaling, adapter.dropout_p = module.scaling[name], getattr(module.lora_dropout[name], "p", 0.0)
    return AdaptedLinear(module.base_layer, adapter)
