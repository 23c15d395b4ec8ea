"""Checks the arguments of replace_linear_with_align_lora and turns options of any form into an AlignLoraConfig."""

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torch import nn

from align_ext.alignment.guards import check_model, refuse_parts_of_a_model
from align_ext.base_model.peft_names import renames_experts
from align_ext.base_model.select_layers import ALL_LINEAR, embeddings_of, name_matches
from align_ext.config import AlignLoraConfig
from align_ext.system.messages import shown
from align_ext.system.names import Matcher

_SUPPORTED = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules", "use_rslora",
    "use_dora", "init_lora_weights", "modules_to_save", "rank_pattern", "alpha_pattern", "layers_to_transform",
    "layers_pattern", "bias", "lora_bias", "trainable_token_indices",
)  # fmt: skip
_ADALORA = ("target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step")
# Options of peft.LoraConfig that do not change the training, or that follow from the layers.
_IGNORED = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "runtime_config", "ensure_weight_tying",
)  # fmt: skip


def resolve_config(model: Any, config: Any, options: Mapping[str, Any]) -> AlignLoraConfig:
    """Returns the options of the adapters.

    Args:
        model: the model.
        config: an AlignLoraConfig, a mapping of its options, a peft.LoraConfig or AdaLoraConfig, or None.
        options: single options of AlignLoraConfig.

    Raises:
        ValueError: config is none of these, or an option is unknown, out of range or not of plain LoRA.
    """
    if any(kind.__name__ == "_PipelineStageBase" for kind in type(model).__mro__):
        refuse_parts_of_a_model(model)
    check_model(model)
    if config is not None and options:
        raise ValueError("give either config or single options, not both")
    if isinstance(config, AlignLoraConfig):
        return config
    if config is None or isinstance(config, Mapping):
        return AlignLoraConfig.from_dict(options if config is None else config)
    if type(config).__name__ in ("LoraConfig", "AdaLoraConfig") and is_dataclass(config):
        return _from_peft(model, config)
    raise ValueError(
        f"config must be an AlignLoraConfig, a dictionary of its options or a peft.LoraConfig, got {shown(config)}"
    )


def _from_peft(model: nn.Module, config: Any) -> AlignLoraConfig:
    """Converts a peft.LoraConfig or AdaLoraConfig; refuses any other option that is set, by its name."""
    kind = type(config).__name__
    of_ranks = _ADALORA if kind == "AdaLoraConfig" else ()
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in (*_SUPPORTED, *_IGNORED, *of_ranks) and value != default and (value or default):
            raise ValueError(
                f"peft.{kind} has {field.name}={shown(value)}, which these adapters have not: leave it out, or "
                "train with PEFT"
            )
    options = {name: getattr(config, name) for name in (*_SUPPORTED, *of_ranks)}
    if options["target_modules"] is None:
        options["target_modules"] = _default_targets(model, config)
    options["exclude_modules"] = options["exclude_modules"] or ()
    options["target_parameters"] = tuple(sorted(options["target_parameters"] or ()))
    for name in ("target_modules", "exclude_modules"):
        options[name] = options[name] if isinstance(options[name], str) else tuple(sorted(options[name]))
    if getattr(config, "ensure_weight_tying", False):
        _refuse_tied_adapters(model, options["target_modules"])
    if options["modules_to_save"] is None:
        del options["modules_to_save"]
    init = options["init_lora_weights"]
    if of_ranks:
        options |= {"architecture": "adalora"} | ({"init_lora_weights": "auto"} if init is True else {})
    elif init not in (True, "gaussian", "orthogonal", "pissa"):
        raise ValueError(
            f"peft.LoraConfig has init_lora_weights={shown(init)}: these adapters start by True, gaussian, orthogonal "
            "or pissa"
        )
    return AlignLoraConfig.from_dict(options)


def _refuse_tied_adapters(model: nn.Module, targets: tuple[str, ...] | str) -> None:
    """Raises if PEFT would give both modules of a tie one adapter."""
    inner, head = embeddings_of(model, "input"), embeddings_of(model, "output")
    if inner is None or head is None or getattr(head, "weight", None) is not getattr(inner, "weight", None):
        return
    for name, module in model.named_modules():
        if module in (inner, head) and targets != ALL_LINEAR and name_matches(Matcher(), name, targets):
            raise ValueError(
                f"peft.LoraConfig has ensure_weight_tying=True and adapts {name}, whose weight the input embeddings "
                "and the head share: here each has its own adapter: leave ensure_weight_tying out, or train with PEFT"
            )


def _default_targets(model: nn.Module, config: Any) -> tuple[str, ...]:
    """Returns the layers that PEFT adapts by default; beside target_parameters of most mixtures none."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if config.target_parameters and (kind not in KNOWN or renames_experts(model)):
        return ()
    if kind not in KNOWN:
        raise ValueError(f"peft.LoraConfig names no target_modules, and PEFT knows none for {shown(kind)}: name them")
    return tuple(KNOWN[kind])
