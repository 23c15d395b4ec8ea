"""Puts adapters in place of a model's linear layers: replace_linear_with_align_lora(model)."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from align_ext.batch import AlignState
from align_ext.config import AlignLoraConfig
from align_ext.hooks import register_hooks
from align_ext.nn.base import AdaptedLinear, has_float_weight, is_conv1d
from align_ext.nn.lora import LoraLinear

logger = logging.getLogger(__name__)
ALL_LINEAR = "all-linear"


@dataclass
class ReplaceReport:
    """What became of the model's linear layers.

    Attributes:
        replaced: names of the adapted layers.
        adopted: those of them that took over a PEFT adapter's weights.
        skipped: name -> reason, for layers that matched target_modules but were left alone.
    """

    replaced: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = Counter(name.rpartition(".")[2] for name in self.replaced)
        counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
        lines = [f"adapted {len(self.replaced)} layers ({counts})"]
        if self.adopted:
            lines.append(f"of them {len(self.adopted)} with the weights of a PEFT adapter")
        lines += [f"left alone {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def replace_linear_with_align_lora(
    model: nn.Module, config: AlignLoraConfig | None = None, **options: Any
) -> nn.Module:
    """Freezes a model and puts an adapter beside each linear layer that the config names, in place.

    nn.Linear and its subclasses, GPT-2's Conv1D and quantised linears are adapted; lm_head, layers with tied weights
    and layers whose forward is bypassed (nn.MultiheadAttention's out_proj) are left alone, and the report says so
    (`adapter_report(model)`, also logged). LoRA layers of a PeftModel are adopted: same Parameters, same scaling.
    A second call changes nothing.

    Args:
        model: any nn.Module; for Llama, Qwen and Mistral the defaults fit.
        config: the options, or
        **options: the options of AlignLoraConfig one by one.

    Returns:
        The same model, with task_ids= as a further argument of its forward when alignment is on.

    Raises:
        ValueError: nothing matched (the message lists the model's linears), the model is wrapped already (DDP, FSDP),
            or an option is unknown or out of range.
    """
    if config is not None and options:
        raise ValueError("give either config or single options, not both")
    config = config or AlignLoraConfig.from_dict(options)
    _refuse_wrapped(model)
    state = getattr(model, "align_state", None)
    if isinstance(state, AlignState):
        logger.warning("the model has adapters already: nothing was changed (unload(model) removes them)")
        return model

    report, targets = ReplaceReport(), {}
    candidates = dict(_linear_like(model))
    adopting = [module for module in candidates.values() if _is_peft_lora(module)]
    for name, module in candidates.items():
        if not (module in adopting if adopting else _matches(name, config, module, model)):
            continue
        reason = _unfit(name, module, model)
        if reason is None:
            targets[name] = module
        else:
            report.skipped[name] = reason
    if not targets:
        raise ValueError(_nothing_matched(model, config, report))

    if adopting:
        config, report.adopted = _adopted_config(config, next(iter(targets.values()))), list(targets)
    state = AlignState(config)
    model.requires_grad_(False)
    for name, module in targets.items():
        layer = _adopt(module) if adopting else _adapt(module, config)
        if config.align is not None:
            layer.align(state, name)
        layer.train(module.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        report.replaced.append(name)
    register_hooks(model, state)
    model.align_report = report  # type: ignore[assignment]
    logger.info("%s", report)
    return model


def adapter_report(model: nn.Module) -> ReplaceReport:
    """What replace_linear_with_align_lora did to this model."""
    report = getattr(model, "align_report", None)
    if report is None:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    return report


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """The adapted layers of a model by module name.

    Raises:
        ValueError: there are none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    if not layers:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    return layers


def _refuse_wrapped(model: nn.Module) -> None:
    wrappers = ("DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule", "DeepSpeedEngine")
    if type(model).__name__ in wrappers or any(type(m).__name__ == "FSDPModule" for m in type(model).__mro__):
        raise ValueError(
            f"the model is wrapped already ({type(model).__name__}): call replace_linear_with_align_lora on the plain "
            "model first, then wrap it"
        )


def _is_peft_lora(module: nn.Module) -> bool:
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def _linear_like(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer, quantised ones and PEFT's included, without the parts of adapters."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) if inside else False:
            continue
        if _is_peft_lora(module):
            inside = (*inside, f"{name}.")
            yield name, module
        elif isinstance(module, nn.Linear) or is_conv1d(module) or _is_quantised_linear(module):
            yield name, module


def _is_quantised_linear(module: nn.Module) -> bool:
    """A linear by its shape attributes that holds its weight in a packed form (GPTQ, AWQ, HQQ, ...)."""
    return (
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and not isinstance(module, (nn.Bilinear, nn.LazyLinear))
        and not list(module.children())
        and not has_float_weight(module)
    )


def _name_matches(name: str, patterns: tuple[str, ...] | str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _matches(name: str, config: AlignLoraConfig, module: nn.Module, model: nn.Module) -> bool:
    if _name_matches(name, config.exclude_modules):
        return False
    if config.target_modules in (ALL_LINEAR, (ALL_LINEAR,)):
        return module is not _output_embeddings(model)
    return _name_matches(name, config.target_modules)


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (NotImplementedError, AttributeError):
        return None


def _unfit(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why a matching layer cannot be adapted, or None."""
    parent = model.get_submodule(name.rpartition(".")[0])
    if isinstance(parent, nn.MultiheadAttention):
        return "nn.MultiheadAttention reads its weight and never calls its forward"
    if module is _output_embeddings(model):
        return "it is the output head (lm_head), often tied to the embeddings"
    if _is_peft_lora(module):
        return _unfit_peft(module)
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        owners = [n for n, m in model.named_modules() if m is not module and weight in _own(m)]
        if owners:
            return f"its weight is tied to {owners[0] or 'the model'}"
    return None


def _own(module: nn.Module) -> set[nn.Parameter]:
    return set(module.parameters(recurse=False))


def _unfit_peft(module: Any) -> str | None:
    if len(module.active_adapters) != 1:
        return f"it has {len(module.active_adapters)} active PEFT adapters, and one can be adopted"
    adapter = module.active_adapters[0]
    if module.merged:
        return "its PEFT adapter is merged: unmerge it first"
    if adapter not in module.lora_A:
        return "its PEFT adapter has no Linear lora_A"
    if module.use_dora.get(adapter) or getattr(module, "lora_variant", {}).get(adapter) is not None:
        return "its PEFT adapter is a variant (DoRA, ...) that plain LoRA cannot take over"
    if module.lora_B[adapter].bias is not None:
        return "its PEFT adapter has lora_bias, which plain LoRA cannot take over"
    return None


def _adapt(module: nn.Module, config: AlignLoraConfig) -> LoraLinear:
    weight_dtype: Any = module.weight.dtype if has_float_weight(module) else torch.float32
    # Double bases are for tests of exactness: their adapters are double too.
    dtype = weight_dtype if config.adapter_dtype == "base" else torch.promote_types(torch.float32, weight_dtype)
    return LoraLinear(module, config.r, config.scaling, config.lora_dropout, dtype)


def _adopt(module: Any) -> LoraLinear:
    """Takes over a PEFT LoRA layer: its base layer, its Parameters themselves, its scaling and dropout."""
    adapter = module.active_adapters[0]
    A, B = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    dropout_p = getattr(module.lora_dropout[adapter], "p", 0.0)
    layer = LoraLinear(module.base_layer, A.shape[0], module.scaling[adapter], dropout_p, A.dtype)
    layer.lora_A.weight, layer.lora_B.weight = A.requires_grad_(True), B.requires_grad_(True)
    return layer


def _adopted_config(config: AlignLoraConfig, module: Any) -> AlignLoraConfig:
    """The options with the rank and scaling of a PEFT layer."""
    adapter = module.active_adapters[0]
    r = module.lora_A[adapter].weight.shape[0]
    return replace(config, r=r, lora_alpha=module.scaling[adapter] * r, use_rslora=False)


def _nothing_matched(model: nn.Module, config: AlignLoraConfig, report: ReplaceReport) -> str:
    names = [name for name, _ in _linear_like(model)]
    kinds = Counter(name.rpartition(".")[2] for name in names)
    found = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items())) or "none at all"
    skipped = "".join(f"; {name} matched, but {reason}" for name, reason in list(report.skipped.items())[:5])
    return (
        f"no layer was adapted: target_modules={config.target_modules!r} matches no linear layer that can be{skipped}. "
        f'The model has these linear layers: {found}; or use target_modules="all-linear"'
    )
