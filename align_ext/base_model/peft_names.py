"""Checks whether stock PEFT finds the right layers by the names in a folder; for some models it does not."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from align_ext.base_model.adopt_peft import PEFT_PREFIX


def peft_misreads(model: nn.Module, layers: Sequence[str], experts: Sequence[str], keys: Collection[str]) -> str | None:
    """Returns why stock PEFT would load an adapter into the wrong layers, or None.

    transformers 5 stores the experts of a mixture in one tensor, and PEFT reads an adapter of such a model as if it was
    made for the earlier layers: gate_proj, up_proj and down_proj, also of dense and shared MLPs, become adapters of the
    experts' tensors, and other names are replaced too. PEFT's own functions tell what it would do.

    Args:
        model: a model with or without adapters.
        layers: the names of the adapted layers in the plain model.
        experts: the names of the adapted tensors of experts.
        keys: the beginnings of the keys of both in the adapter's file.
    """
    try:
        from peft import LoraConfig
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # PEFT is missing, or is older and converts nothing
        return None
    get_plain: Any = getattr(model, "get_base_model", None)
    plain: Any = model if get_plain is None else get_plain()
    if not hasattr(getattr(plain, "config", None), "model_type"):
        return None
    config = LoraConfig(target_modules=list(layers), target_parameters=list(experts) or None)
    try:
        conversion.convert_peft_config_for_transformers(config, plain, conversion.get_model_conversion_mapping(plain))
    except ValueError as error:
        return f"for {plain.config.model_type} models it refuses the names of these layers ({error})"
    lost = set(layers) - set(config.target_modules or ())
    tensors = {f"{key}.lora_{part}.weight": torch.empty(0) for key in keys for part in "AB"}
    if not lost:
        read = conversion.convert_peft_adapter_state_dict_for_transformers(plain, config, dict(tensors))
        lost = tensors.keys() - read.keys()
    if lost:
        name = min(lost).removeprefix(PEFT_PREFIX)
        return f"for {plain.config.model_type} models it takes {name} for a layer of another name (a mixture's experts)"
    return None


def renames_experts(model: nn.Module) -> bool:
    """Whether PEFT takes names of a model's layers for those of its experts' tensors; it then has no default layers."""
    try:
        from peft import LoraConfig
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:
        return False
    config = LoraConfig(target_parameters=["experts.down_proj"])
    convert_peft_config_for_transformers(config, model, None)
    return config.target_modules is not None
