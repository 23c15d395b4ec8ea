"""Checks whether stock PEFT finds the right layers by the names in a folder; for some models it does not."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from align_ext.base_model.adopt_peft import PEFT_PREFIX


def peft_misreads(model: nn.Module, layers: Sequence[str]) -> str | None:
    """Returns why stock PEFT would load an adapter into the wrong layers, or None.

    transformers 5 stores the experts of a mixture in one tensor, and PEFT reads an adapter of such a model as if it was
    made for the earlier layers: gate_proj, up_proj and down_proj, also of dense and shared MLPs, become adapters of the
    experts' tensors, and other names are replaced too. PEFT's own functions tell what it would do.

    Args:
        model: a model with or without adapters.
        layers: the names of the adapted layers in the plain model.
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
    config = LoraConfig(target_modules=list(layers))
    try:
        conversion.convert_peft_config_for_transformers(config, plain, conversion.get_model_conversion_mapping(plain))
    except ValueError as error:
        return f"for {plain.config.model_type} models it refuses the names of these layers ({error})"
    lost = set(layers) - set(config.target_modules or ())
    keys = {f"{PEFT_PREFIX}{name}.lora_{part}.weight": torch.empty(0) for name in layers for part in "AB"}
    if not lost:
        read = conversion.convert_peft_adapter_state_dict_for_transformers(plain, config, dict(keys))
        lost = keys.keys() - read.keys()
    if lost:
        name = min(lost).removeprefix(PEFT_PREFIX)
        return f"for {plain.config.model_type} models it takes {name} for a layer of another name (a mixture's experts)"
    return None
