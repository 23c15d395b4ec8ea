"""Puts adapters in place of a model's linear layers: replace_linear_with_align_lora(model)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from align_ext.config import AlignLoraConfig
from align_ext.hf.adopt import (
    PEFT_PREFIX,
    adopt,
    adopt_copies,
    adopted_config,
    is_peft_lora,
    refuse_other_peft,
    refuse_unfit,
    unfit_peft,
)
from align_ext.hf.beside import is_below, modules_to_train, start_training, tensors_of
from align_ext.hf.blocks import find_blocks
from align_ext.hf.bypassed import bypassed
from align_ext.hf.given import config_of
from align_ext.hf.modalities import refuse_other_modalities
from align_ext.hf.pretrained import stand_in
from align_ext.hooks import register_hooks
from align_ext.nn import adapter_class
from align_ext.nn.base import AdaptedLinear, Adapter, features_of, has_float_weight, is_conv1d
from align_ext.nn.block import AdaptedBlock
from align_ext.reading import Matcher, shown
from align_ext.sources import watch_layers
from align_ext.state import AlignState, find_state, refuse_parts_of_a_model

logger = logging.getLogger(__name__)
ALL_LINEAR = "all-linear"
Adapted = AdaptedLinear | AdaptedBlock


@dataclass
class ReplaceReport:
    """What became of the model's linear layers.

    Attributes:
        replaced: names of the adapted layers.
        adopted: those of them that took over a PEFT adapter's weights.
        skipped: name -> reason, for layers that matched target_modules but were left alone.
        unmatched: what else may have been meant: patterns that match nothing, experts that are no linear layers.
        trained: names of the modules that are trained whole beside the adapters.
    """

    replaced: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        kinds = Counter(name.rpartition(".")[2] for name in self.replaced)
        counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
        lines = [f"adapted {len(self.replaced)} layers ({counts})"]
        if self.adopted:
            lines.append(f"of them {len(self.adopted)} with the weights of a PEFT adapter")
        lines += [f"trained whole beside them: {', '.join(self.trained)}"] if self.trained else []
        lines += [f"left alone {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([*lines, *self.unmatched])


def replace_linear_with_align_lora(
    model: nn.Module, config: AlignLoraConfig | Mapping[str, Any] | Any = None, **options: Any
) -> nn.Module:
    """Freezes a model and puts an adapter beside each linear layer that the config names, in place.

    nn.Linear and its subclasses, GPT-2's Conv1D and quantised linears are adapted; lm_head, layers with tied weights
    and layers whose forward is bypassed (nn.TransformerEncoderLayer's) are left alone, and the report says so
    (`adapter_report(model)`, also logged). The new head of a model that classifies, or what modules_to_save names, is
    trained whole beside the adapters, and so is what gets requires_grad afterwards. LoRA layers of a PeftModel are
    adopted: same Parameters, same scaling. A second call changes nothing.

    Args:
        model: any nn.Module; for Llama, Qwen and Mistral the defaults fit.
        config: the options, as an AlignLoraConfig, a dictionary or a peft.LoraConfig; or
        **options: the options of AlignLoraConfig one by one.

    Returns:
        The same model, with task_ids= as a further argument of its forward when alignment is on.

    Raises:
        ValueError: nothing matched (the message lists the model's linears), the model is wrapped already (DDP, FSDP),
            or an option is unknown or out of range.
    """
    config = config_of(model, config, options)
    if find_state(model) is not None:
        logger.warning("the model has adapters already: nothing was changed (unload(model) removes them)")
        return model
    return adapt(model, config)


def adapt(
    model: nn.Module,
    config: AlignLoraConfig,
    ranks: Mapping[str, int] | None = None,
    trained: Collection[str] = (),
    fill: Callable[[dict[str, Adapter]], None] | None = None,
) -> nn.Module:
    """Puts adapters into a plain model or a PeftModel; whatever raises, the model is as it was.

    Args:
        model: the model.
        config: the options.
        ranks: of an adapter that is about to be loaded, by module name; no first values are drawn for it then.
        trained: names of the tensors that are about to be loaded beside it; what they belong to is not adapted.
        fill: gives the adapters their values, or raises.
    """
    _refuse_wrapped(model)
    refuse_other_peft(model)
    report = ReplaceReport()
    candidates = dict(_linear_like(model))
    adopting = {name: module for name, module in candidates.items() if is_peft_lora(module)}
    state = AlignState(config)
    layers: dict[str, Adapted] = {}
    whole = modules_to_train(model, config) if ranks is None and not adopting else []
    if ranks is not None:  # adapted layers may have a trained bias
        whole = [name for name in {key.rpartition(".")[0] for key in trained} if name not in ranks]
    if config.target_blocks and not adopting:
        for name, (block, hidden) in _target_blocks(model, config).items():
            layers[name] = AdaptedBlock(block, _adapter(name, block, (hidden, hidden), config, reset=ranks is None))
    else:
        targets = _targets(model, config, adopting or candidates, report, whole, by_name=not adopting)
        if not targets:
            raise ValueError(_nothing_matched(model, candidates, config, report))
        if adopting:
            copies = refuse_unfit(model, targets, report.skipped)
            config, report.adopted = adopted_config(config, targets), list(targets)
            logger.info("r, lora_alpha, lora_dropout and target_modules are the PEFT adapter's: %s", config)
            state = AlignState(config)
            layers = {name: adopt(module, config) for name, module in targets.items()}
            whole = [name.removeprefix(PEFT_PREFIX) for name in copies]
        else:
            report.unmatched = _unmatched(config, candidates, model)
            for name, module in targets.items():
                options = replace(config, r=(ranks or {}).get(name, config.r))
                adapter = _adapter(name, module, features_of(module), options, reset=ranks is None)
                layers[name] = AdaptedLinear(module, adapter)
    if config.needs_step:
        refuse_other_modalities(model, layers)
    if fill is not None:
        fill({name: layer.adapter for name, layer in layers.items()})
    register_hooks(model, state)  # the last that may raise
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.adapter.requires_grad_(True)
        if config.needs_step:
            layer.adapter.join(state, name)
        layer.training = layer.base_layer.training
        layer.adapter.train(layer.training)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
        report.replaced.append(name)
    watch_layers(model, state)
    if adopting:
        state.originals = adopt_copies(model, copies)
    if ranks is None:
        report.trained = whole
        start_training(model, [name for name in tensors_of(model) if is_below(name, whole)])
    stand_in(model)
    model.align_report = report  # type: ignore[assignment]
    (logger.warning if report.unmatched else logger.info)("%s", report)
    return model


def _targets(
    model: nn.Module,
    config: AlignLoraConfig,
    candidates: Mapping[str, nn.Module],
    report: ReplaceReport,
    whole: Collection[str],
    *,
    by_name: bool,
) -> dict[str, nn.Module]:
    """The layers to adapt; those that match and cannot be go into the report."""
    targets, matcher = {}, Matcher()
    for name, module in candidates.items():
        if by_name and not _matches(matcher, name, config, module, model):
            continue
        trained = is_below(f"{name}.", whole)
        reason = "it is trained whole (modules_to_save)" if trained else _unfit(name, module, model)
        if reason is None:
            targets[name] = module
        else:
            report.skipped[name] = reason
    return targets


def layer_names(model: nn.Module) -> list[str]:
    """The names of a model's linear layers, without its output head."""
    head = _output_embeddings(model)
    return [name for name, module in _linear_like(model) if module is not head]


def sizes_to_adapt(model: nn.Module, config: AlignLoraConfig) -> list[tuple[int, int]]:
    """(in, out) of each layer or block of a plain model that a config would adapt; nothing is built.

    Raises:
        ValueError: it would adapt nothing.
    """
    if config.target_blocks:
        return [(hidden, hidden) for _, hidden in _target_blocks(model, config).values()]
    candidates, report = dict(_linear_like(model)), ReplaceReport()
    targets = _targets(model, config, candidates, report, modules_to_train(model, config), by_name=True)
    if not targets:
        raise ValueError(_nothing_matched(model, candidates, config, report))
    return [features_of(module) for module in targets.values()]


def _target_blocks(model: nn.Module, config: AlignLoraConfig) -> dict[str, tuple[nn.Module, int]]:
    """The blocks to adapt with their hidden sizes."""
    found = find_blocks(model, config.target_blocks)
    matcher, excluded = Matcher(), config.exclude_modules
    blocks = {name: block for name, block in found.items() if not _name_matches(matcher, name, excluded)}
    if not blocks:
        raise ValueError(f"no block was adapted: exclude_modules={shown(config.exclude_modules)} excludes all of them")
    return blocks


def adapter_report(model: nn.Module) -> ReplaceReport:
    """What replace_linear_with_align_lora did to this model."""
    report = getattr(model, "align_report", None)
    if report is None:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    return report


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers and blocks of a model by module name.

    Raises:
        ValueError: there are none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    if not layers:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    return layers


def _refuse_wrapped(model: nn.Module) -> None:
    wrappers = (
        "DistributedDataParallel",
        "FullyShardedDataParallel",
        "OptimizedModule",
        "DataParallel",
        "DeepSpeedEngine",
    )
    refuse_parts_of_a_model(model)
    sharded = any(kind.__name__ == "FSDPModule" for module in model.modules() for kind in type(module).__mro__)
    if type(model).__name__ in wrappers or sharded:
        raise ValueError(
            f"the model is wrapped already ({type(model).__name__}): call replace_linear_with_align_lora on the plain "
            "model first, then wrap it"
        )


def _linear_like(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every linear layer, quantised ones and PEFT's included, without the parts of adapters."""
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if is_peft_lora(module):
            inside = (*inside, f"{name}.")
            yield name, module
        elif is_linear(module):
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: nn.Linear and its subclasses, GPT-2's Conv1D, quantised ones."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or _is_quantised_linear(module)


def _is_quantised_linear(module: nn.Module) -> bool:
    """A linear by its shape attributes that holds its weight in a packed form (GPTQ, AWQ, HQQ, ...)."""
    return (
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and not isinstance(module, (nn.Bilinear, nn.LazyLinear))
        and not list(module.children())
        and not has_float_weight(module)
    )


def _name_matches(matcher: Matcher, name: str, patterns: tuple[str, ...] | str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts."""
    if isinstance(patterns, str):
        return matcher.matches(patterns, name)
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _matches(matcher: Matcher, name: str, config: AlignLoraConfig, module: nn.Module, model: nn.Module) -> bool:
    if _name_matches(matcher, name, config.exclude_modules):
        return False
    if _all_linear(config):
        return module is not _output_embeddings(model)
    return _name_matches(matcher, name, config.target_modules)


def _all_linear(config: AlignLoraConfig) -> bool:
    return config.target_modules in (ALL_LINEAR, (ALL_LINEAR,))


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    get = getattr(model, "get_output_embeddings", None)
    try:
        return get() if get is not None else None
    except (NotImplementedError, AttributeError):
        return None


def _unfit(name: str, module: nn.Module, model: nn.Module) -> str | None:
    """Why a matching layer cannot be adapted, or None."""
    if module is _output_embeddings(model):
        return "it is the output head (lm_head), often tied to the embeddings"
    if reason := bypassed(name, model):
        return reason
    if is_peft_lora(module):
        return unfit_peft(module)
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        if weight.is_meta and not hasattr(module, "_hf_hook") and _is_offloaded_with(name, model):
            return "its weight is offloaded together with its parent's: offload layer by layer instead"
        owners = [n for n, m in model.named_modules() if m is not module and weight in _own(m)]
        if owners:
            return f"its weight is tied to {owners[0] or 'the model'}"
    return None


def _is_offloaded_with(name: str, model: nn.Module) -> bool:
    """Whether accelerate loads a layer's weight by an ancestor's hook."""
    parts = name.split(".")
    ancestors = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return any(getattr(getattr(m, "_hf_hook", None), "place_submodules", False) for m in ancestors)


def _own(module: nn.Module) -> set[nn.Parameter]:
    return set(module.parameters(recurse=False))


def _adapter(name: str, module: nn.Module, sizes: tuple[int, int], config: AlignLoraConfig, *, reset: bool) -> Adapter:
    """An adapter with its first values, on the device and in the dtype that the options and the module call for."""
    if config.r > min(sizes):
        raise ValueError(
            f"r={config.r} is above what {name} can use, {sizes[0]} inputs and {sizes[1]} outputs: choose r <= "
            f"{min(sizes)}, or leave the layer out by exclude_modules"
        )
    tensors: list[Any] = [*module.parameters(), *module.buffers()]  # packed weights are buffers
    device = tensors[0].device if tensors else torch.device("cpu")
    hook = getattr(module, "_hf_hook", None)  # offloaded weights rest on meta and run elsewhere
    device = torch.device(getattr(hook, "execution_device", None) or device)
    first: Any = next((layer.weight for layer in module.modules() if has_float_weight(layer)), torch.empty(0))
    # Double bases are for tests of exactness: their adapters are double too.
    dtype = first.dtype if config.adapter_dtype == "base" else torch.promote_types(torch.float32, first.dtype)
    with torch.device(device):
        adapter = adapter_class(config)(config, *sizes).to(dtype)
        weight = first.T if is_conv1d(module) else first
        if reset:
            adapter.reset_lora_parameters(weight if config.init_lora_weights == "pissa" else None)
    return adapter


def _unmatched(config: AlignLoraConfig, candidates: Mapping[str, nn.Module], model: nn.Module) -> list[str]:
    """What the user may have meant to adapt and nothing was: patterns without a match, experts in one tensor."""
    patterns = () if isinstance(config.target_modules, str) or _all_linear(config) else config.target_modules
    lines = [
        f"target_modules: {pattern!r} matches no linear layer"
        for pattern in patterns
        if not any(_name_matches(Matcher(), name, (pattern,)) for name in candidates)
    ]
    experts = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name]
    if experts:
        lines.append(
            f"{len(experts)} tensors of experts, such as {experts[0]}, are no linear layers and stay as they are"
        )
    return lines


def _nothing_matched(
    model: nn.Module, candidates: Mapping[str, nn.Module], config: AlignLoraConfig, report: ReplaceReport
) -> str:
    kinds = Counter(name.rpartition(".")[2] for name in candidates)
    found = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items())) or "none at all"
    skipped = "".join(f"; {name} matched, but {reason}" for name, reason in list(report.skipped.items())[:5])
    return (
        f"no layer was adapted: target_modules={shown(config.target_modules)} matches no linear layer that can "
        f"be{skipped}. "
        f'The model has these linear layers: {found}; or use target_modules="all-linear"'
    )
