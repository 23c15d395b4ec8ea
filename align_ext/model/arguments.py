"""What replace_linear_with_align_lora is given: a model, and options in any of the forms that people have them in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torch import nn

from align_ext.alignment.guards import check_model, refuse_parts_of_a_model
from align_ext.config import AlignLoraConfig
from align_ext.system.reading import shown

_TAKEN = ("r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora", "init_lora_weights",
          "modules_to_save")  # fmt: skip
# What says nothing of what is trained, or what the layers themselves tell.
_IGNORED = (
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "fan_in_fan_out", "runtime_config",
)  # fmt: skip


def config_of(model: Any, config: Any, options: Mapping[str, Any]) -> AlignLoraConfig:
    """The options of the adapters.

    Args:
        model: the model.
        config: an AlignLoraConfig, a mapping of its options, a peft.LoraConfig, or None.
        options: its options one by one.

    Raises:
        ValueError: it is none of these, or has an option that is unknown, out of range or not of plain LoRA.
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
    if type(config).__name__ == "LoraConfig" and is_dataclass(config):
        return _from_peft(model, config)
    raise ValueError(
        f"config must be an AlignLoraConfig, a dictionary of its options or a peft.LoraConfig, got {shown(config)}"
    )


def _from_peft(model: nn.Module, config: Any) -> AlignLoraConfig:
    """The options of a peft.LoraConfig; what it has beyond them and set is refused by its name."""
    for field in fields(config):
        default = field.default if field.default_factory is MISSING else field.default_factory()
        value = getattr(config, field.name)
        if field.name not in (*_TAKEN, *_IGNORED) and value != default and (value or default):
            raise ValueError(
                f"peft.LoraConfig has {field.name}={shown(value)}, which these adapters have not: leave it out, or "
                "train with PEFT"
            )
    given = {name: getattr(config, name) for name in _TAKEN}
    if given["target_modules"] is None:
        given["target_modules"] = _default_targets(model)
    given["exclude_modules"] = given["exclude_modules"] or ()
    for name in ("target_modules", "exclude_modules"):
        given[name] = given[name] if isinstance(given[name], str) else tuple(sorted(given[name]))
    if given["modules_to_save"] is None:
        del given["modules_to_save"]
    start = given["init_lora_weights"]
    if start not in (True, "gaussian", "orthogonal", "pissa"):
        raise ValueError(
            f"peft.LoraConfig has init_lora_weights={shown(start)}: these adapters start by True, gaussian, orthogonal "
            "or pissa"
        )
    return AlignLoraConfig.from_dict(given)


def _default_targets(model: nn.Module) -> tuple[str, ...]:
    """The layers that PEFT adapts where nobody names any."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in KNOWN:
        raise ValueError(f"peft.LoraConfig names no target_modules, and PEFT knows none for {shown(kind)}: name them")
    return tuple(KNOWN[kind])
