"""Replaces a model's linear layers by layers with adapters: replace_linear_with_align_lora(model)."""

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from align_ext.adapters import make_adapter
from align_ext.adapters.adapted_block import Adapted, AdaptedBlock, adapted_layers
from align_ext.adapters.adapted_experts import AdaptedParameter, insert_parameter
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.adapters.base import Adapter
from align_ext.adapters.embedding import AdaptedEmbedding, EmbeddingAdapter
from align_ext.adapters.init import FROM_WEIGHT
from align_ext.adapters.linear_layer import device_of, features_of, has_float_weight, is_conv1d
from align_ext.adapters.mixlora import ExpertLinear, mix_blocks
from align_ext.adapters.siblings import join_siblings
from align_ext.adapters.trained_rows import TrainedRows
from align_ext.alignment.forward_hooks import register_hooks
from align_ext.alignment.guards import refuse_parts_of_a_model
from align_ext.alignment.model_state import AlignState, find_state, require_state
from align_ext.alignment.sources import watch_layers
from align_ext.base_model.adopt_peft import (
    PEFT_PREFIX,
    adopt,
    adopt_full_modules,
    adopted_config,
    is_peft_lora,
    refuse_other_peft,
    refuse_unadoptable,
)
from align_ext.base_model.default_targets import with_targets
from align_ext.base_model.find_blocks import find_blocks, mixture_parts
from align_ext.base_model.fingerprint import BaseModel
from align_ext.base_model.modalities import other_modalities, refuse_other_modalities
from align_ext.base_model.modules_to_save import (
    biases,
    buffers_of,
    is_inside,
    modules_to_train,
    start_training,
    tensors_of,
)
from align_ext.base_model.quantised import dequantised, keep_differentiable
from align_ext.base_model.select_experts import aligns_experts, find_expert_tensors, hints_of_experts, sizes_of
from align_ext.base_model.select_layers import (
    adaptable_layers,
    embeddings_of,
    find_targets,
    linear_layers,
    name_matches,
    nothing_matched_message,
    registered_names,
    tied_to,
    unmatched_hints,
)
from align_ext.base_model.token_rows import put, rows_to_train
from align_ext.config import AlignLoraConfig
from align_ext.model.arguments import resolve_config
from align_ext.model.save_pretrained import override_methods, refuse_outer_model
from align_ext.system.messages import shown
from align_ext.system.names import Matcher, check_names

logger = logging.getLogger(__name__)


@dataclass
class ReplaceReport:
    """Lists which linear layers of a model were adapted, and which were not; adapter_report adds their state.

    Attributes:
        replaced: names of the adapted layers.
        adopted: names of the adapted layers that have the weights of a PEFT adapter.
        skipped: name -> reason, for layers that matched target_modules but were not adapted.
        unmatched: hints: patterns that match nothing, experts that are not adapted or not aligned.
        trained: names of the modules that are fully trained beside the adapters.
        excessive: names of the adapted layers whose r is above the smaller of their inputs and outputs.
        active: the name of the adapter that this is about.
        enabled: whether the model runs with it (disable_adapter).
        merged: names of the layers that have it merged into their weight.
        frozen: names of the layers of whose adapter nothing is trained.
        placed: "dtype on device" of the adapters' parameters, each once.
        rows: name -> number of trained rows, of embeddings of which some rows are trained.
    """

    replaced: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: list[str] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    excessive: list[str] = field(default_factory=list)
    active: str = ""
    enabled: bool = True
    merged: list[str] = field(default_factory=list)
    frozen: list[str] = field(default_factory=list)
    placed: list[str] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = Counter(name.rpartition(".")[2] for name in self.replaced)
        counts = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
        lines = [f"adapted {len(self.replaced)} layers ({counts})", *([self._state()] if self.active else [])]
        if self.adopted:
            lines.append(f"of them {len(self.adopted)} with the weights of a PEFT adapter")
        lines += [f"trained whole beside them: {', '.join(self.trained)}"] if self.trained else []
        lines += [f"trained rows of {name}: {count}" for name, count in self.rows.items()]
        lines += [f"left alone {name}: {reason}" for name, reason in self.skipped.items()]
        if self.excessive:
            more = f" and of {len(self.excessive) - 1} others" if len(self.excessive) > 1 else ""
            lines.append(
                f"r is above the smaller of the inputs and outputs of {self.excessive[0]}{more}: it gains nothing"
            )
        return "\n".join([*lines, *self.unmatched])

    def _state(self) -> str:
        count = len(self.replaced)
        trained = [f"not trained in {len(self.frozen)} of {count} layers"] if self.frozen else ["trained"]
        merged = [f"merged in {len(self.merged)} of {count} layers"] if self.merged else []
        return f"{self.active}: " + ", ".join([*self.placed, *trained, *merged, *["disabled"] * (not self.enabled)])


def replace_linear_with_align_lora(
    model: nn.Module, config: AlignLoraConfig | Mapping[str, Any] | Any = None, **options: Any
) -> nn.Module:
    """Freezes a model and adds an adapter to each linear layer that the config names, in place.

    By default those are the feed-forward layers of every block (align_ext/base_model/default_targets.py).
    nn.Linear and its subclasses, GPT-2's Conv1D and quantised linears are adapted, lm_head and embeddings where they
    are named, and tensors of experts that target_parameters names. Layers with tied weights, but for these, and layers
    whose forward is bypassed (nn.TransformerEncoderLayer's) are not, and the report lists them
    (`adapter_report(model)`, also logged). The new head of a classification model, or the modules in modules_to_save,
    are fully trained beside the adapters; parameters that get requires_grad later are trained too. LoRA layers of a
    PeftModel are adopted: same Parameters, same scaling. A second call changes nothing.

    Args:
        model: any nn.Module.
        config: the options, as an AlignLoraConfig, a dictionary or a peft.LoraConfig; or
        **options: the options of AlignLoraConfig one by one.

    Returns:
        The same model; its forward has the additional argument task_ids= when alignment is on.

    Raises:
        ValueError: no layer matched (the message lists the linear layers), the model is wrapped already (DDP, FSDP),
            or an option is unknown or out of range.
    """
    config = resolve_config(model, config, options)
    if find_state(model) is not None:
        logger.warning("the model has adapters already: nothing was changed (unload(model) removes them)")
        return model
    return insert_adapters(model, config)


def insert_adapters(
    model: nn.Module,
    config: AlignLoraConfig,
    ranks: Mapping[str, int] | None = None,
    trained: Collection[str] = (),
    fill: Callable[[dict[str, Adapter]], None] | None = None,
) -> nn.Module:
    """Inserts adapters into a plain model or a PeftModel; if anything raises, the model is unchanged.

    Args:
        model: the model.
        config: the options.
        ranks: the ranks of adapters that will be loaded, by module name; they are then not initialised.
        trained: names of other tensors that will be loaded; their modules are not adapted.
        fill: sets the values of the adapters, or raises.
    """
    _refuse_wrapped(model)
    refuse_other_peft(model)
    report = ReplaceReport()
    candidates = adaptable_layers(model)
    adopting = {name: module for name, module in candidates.items() if is_peft_lora(module)}
    config = config if adopting else with_targets(config, model)
    state = AlignState(config)
    layers: dict[str, Adapted] = {}
    full_names = modules_to_train(model, config) if ranks is None and not adopting else []
    if ranks is not None:  # adapted layers may have a trained bias
        full_names = [name for name in {key.rpartition(".")[0] for key in trained} if name not in ranks]
    if config.target_blocks and not adopting:
        for name, (block, hidden) in _target_blocks(model, config).items():
            layers[name] = AdaptedBlock(block, _build(name, block, (hidden, hidden), config, reset=ranks is None))
    else:
        chosen = adopting or candidates
        fixed = ranks or ()
        targets = find_targets(model, config, chosen, report.skipped, full_names, by_name=not adopting, ranked=fixed)
        for name in fixed if not adopting else ():
            if name in report.skipped:
                raise ValueError(f"the folder has an adapter of {name}, which cannot have one: {report.skipped[name]}")
        experts = {} if adopting else find_expert_tensors(model, config, full_names)
        if not targets and not experts:
            raise ValueError(nothing_matched_message(model, candidates, config, report.skipped))
        if adopting:
            full_modules = refuse_unadoptable(model, targets, report.skipped)
            config, report.adopted = adopted_config(config, targets), list(targets)
            logger.info("r, lora_alpha, lora_dropout and target_modules are the PEFT adapter's: %s", config)
            state = AlignState(config)
            layers = {name: adopt(module, config) for name, module in targets.items()}
            full_names = [name.removeprefix(PEFT_PREFIX) for name in full_modules]
        else:
            report.unmatched = unmatched_hints(config, candidates, targets, report.skipped)
            report.unmatched += hints_of_experts(model, config, experts)
            matcher, parts = Matcher(), mixture_parts(model, config, targets)
            for name, sizes in _sizes(model, config, targets, experts).items():
                options = config.of_layer(name, matcher) if ranks is None else replace(config, r=ranks[name])
                module = (targets | experts)[name]
                adapter = _build(name, module, sizes, options, reset=ranks is None)
                if name in experts:
                    layers[name] = AdaptedParameter(module, name.rpartition(".")[2], adapter)
                elif name in parts:
                    layers[name] = expert = ExpertLinear(module, adapter)
                    expert.adapter.block = parts[name].block
                else:
                    kind = AdaptedEmbedding if isinstance(module, nn.Embedding) else AdaptedLinear
                    layers[name] = kind(module, adapter)
    if ranks is None:
        made = {name: layer.adapter for name, layer in layers.items()}
        report.excessive = [name for name, a in made.items() if a.r > min(a.in_features, a.out_features)]
    if config.use_dora:
        _start_magnitudes(layers, reset=not adopting)
    keys = [f"{PEFT_PREFIX}{name}.lora_A.weight" for name in layers]
    check_names(keys, "a folder cannot hold the adapters of these layers", maximum=len(keys))
    if config.needs_step:
        refuse_other_modalities(model, layers)
    rows = rows_to_train(model, config, [*(name.removeprefix(PEFT_PREFIX) for name in layers), *full_names])
    if fill is not None:
        fill({name: layer.adapter for name, layer in layers.items()})
    names = registered_names(model)
    for name, layer in layers.items():
        if isinstance(layer, AdaptedLinear):
            layer.tied_to = tied_to(name, layer.base_layer, names)
    wrappers = {module: wrapper for one in rows for module, wrapper in one.wrappers(config).items()}
    put_in_place(model, state, layers, wrappers)  # the last call that may raise
    keep_differentiable(model)
    model.requires_grad_(False)
    for name, layer in layers.items():
        layer.adapter.requires_grad_(True)
        if config.needs_step and (aligns_experts(model, config) or not isinstance(layer, AdaptedParameter)):
            layer.adapter.join(state, name)
        layer.dequantised = dequantised
        layer.register_state_dict_pre_hook(refuse_outer_model)
        report.replaced.append(name)
    for wrapper in wrappers.values():
        wrapper.adapter.requires_grad_(True)
        wrapper.register_state_dict_pre_hook(refuse_outer_model)
    report.rows = {one.name: len(one.tokens) for one in rows}
    watch_layers(model, state)
    if adopting:
        state.originals = adopt_full_modules(model, full_modules)
    before = {n: state.originals.get(n, buffer) for n, buffer in buffers_of(model).items()}
    state.buffers = {n: None if buffer is None else buffer.clone() for n, buffer in before.items()}
    if ranks is None:
        report.trained = full_names
        trained_biases = biases(model, config.bias, [name.removeprefix(PEFT_PREFIX) for name in layers])
        if config.bias != "none" and not trained_biases:
            report.unmatched.append(f"bias={config.bias!r}: the model has no such biases")
        start_training(model, [*(name for name in tensors_of(model) if is_inside(name, full_names)), *trained_biases])
    state.samples = dict(BaseModel.of(model).weights)
    state.report = report
    (logger.warning if report.unmatched or report.excessive else logger.info)("%s", report)
    return model


def put_in_place(
    model: nn.Module, state: AlignState, layers: Mapping[str, Adapted], rows: Mapping[nn.Module, TrainedRows]
) -> None:
    """Puts adapted layers, and modules of which rows are trained, in the places of the base's.

    If anything raises, the model is unchanged.
    """
    register_hooks(model, state)
    for name, layer in layers.items():
        layer.training = layer.base_layer.training
        layer.adapter.train(layer.training)
        if isinstance(layer, AdaptedParameter):
            insert_parameter(model, name, layer)
        else:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
    put(model, rows)
    state.handles += mix_blocks(model, layers)
    if state.config.share_inputs:
        join_siblings(model)
    override_methods(model)


def layer_names(model: nn.Module, *, with_head: bool) -> list[str]:
    """Returns the names of a model's linear layers, with or without its output head."""
    head = None if with_head else embeddings_of(model, "output")
    return [name for name, module in linear_layers(model) if module is not head]


def layers_to_adapt(model: nn.Module, config: AlignLoraConfig) -> dict[str, tuple[int, ...]]:
    """Returns the sizes of each layer, block or tensor of experts of a plain model that a config would adapt, by name.

    These are what make_adapter takes: (in, out), and more for experts.

    Raises:
        ValueError: the config would adapt no layer.
    """
    if config.target_blocks:
        return {name: (hidden, hidden) for name, (_, hidden) in _target_blocks(model, config).items()}
    candidates, skipped, config = adaptable_layers(model), dict[str, str](), with_targets(config, model)
    trained = modules_to_train(model, config)
    targets = find_targets(model, config, candidates, skipped, trained, by_name=True)
    experts = find_expert_tensors(model, config, trained)
    if not targets and not experts:
        raise ValueError(nothing_matched_message(model, candidates, config, skipped))
    return _sizes(model, config, targets, experts)


def _sizes(
    model: nn.Module, config: AlignLoraConfig, targets: Mapping[str, nn.Module], experts: Mapping[str, nn.Module]
) -> dict[str, tuple[int, ...]]:
    """Returns the sizes of linear layers and of tensors of experts, as make_adapter takes them."""
    parts = mixture_parts(model, config, targets)
    sizes = {name: (*features_of(module), *parts.get(name, ("",))[1:]) for name, module in targets.items()}
    return sizes | {name: sizes_of(module, name.rpartition(".")[2]) for name, module in experts.items()}


def _target_blocks(model: nn.Module, config: AlignLoraConfig) -> dict[str, tuple[nn.Module, int]]:
    """Returns the blocks to adapt, and their hidden sizes, by name."""
    found = find_blocks(model, config.target_blocks)
    others = other_modalities(model, found) if config.needs_step else {}
    found = {name: block for name, block in found.items() if name not in others} or found
    matcher, excluded = Matcher(), config.exclude_modules
    blocks = {name: block for name, block in found.items() if not name_matches(matcher, name, excluded)}
    if not blocks:
        raise ValueError(f"no block was adapted: exclude_modules={shown(config.exclude_modules)} excludes all of them")
    return blocks


def adapter_report(model: nn.Module) -> ReplaceReport:
    """Returns the report of replace_linear_with_align_lora for this model, and the state of its adapters now."""
    state, layers = require_state(model), adapted_layers(model)
    parameters = {name: list(layer.adapter.parameters()) for name, layer in layers.items()}
    report: ReplaceReport = state.report
    return replace(
        report, active=state.name, enabled=not state.disabled,
        merged=[name for name, layer in layers.items() if getattr(layer, "merged", False)],
        frozen=[name for name, found in parameters.items() if not any(p.requires_grad for p in found)],
        placed=sorted({f"{str(p.dtype)[6:]} on {p.device}" for found in parameters.values() for p in found}),
    )  # fmt: skip


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


def _start_magnitudes(layers: Mapping[str, Any], *, reset: bool) -> None:
    """Checks that the layers tell DoRA their weights; m is then the norms of the adapted weight as it is now."""
    for name, layer in layers.items():
        layer.dequantised = dequantised
        try:
            norms = layer.row_norms()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if reset:  # in float32 whatever adapter_dtype says: steps of 16 bits are larger than what is learnt
            layer.adapter.lora_magnitude_vector.data = norms


def _build(name: str, module: nn.Module, sizes: tuple[int, ...], config: AlignLoraConfig, *, reset: bool) -> Adapter:
    """Builds an adapter with initial values, on the module's device and in the dtype of the options."""
    start = config.init_lora_weights
    if reset and start in FROM_WEIGHT and config.r > min(sizes):
        what, by = ("singular directions", "PiSSA") if start == "pissa" else ("rows or columns", "NLoRA")
        raise ValueError(
            f"{name}: r={config.r} is above the {min(sizes)} {what} of its weight, by which {by} starts: "
            f"choose r <= {min(sizes)}, leave the layer out by exclude_modules, or start otherwise"
        )
    frozen: Any = next((layer.weight for layer in module.modules() if has_float_weight(layer)), torch.empty(0))
    frozen = getattr(module, name.rpartition(".")[2]) if len(sizes) == 3 else frozen  # a tensor of experts
    # A float64 base, as in tests of exactness, gets float64 adapters.
    dtype = frozen.dtype if config.adapter_dtype == "base" else torch.promote_types(torch.float32, frozen.dtype)
    with torch.device(device_of(module)):
        kind = EmbeddingAdapter if isinstance(module, nn.Embedding) else make_adapter
        adapter: Adapter = kind(config, *sizes).to(dtype)
        weight = frozen.T if is_conv1d(module) else frozen
        if reset:
            adapter.reset_lora_parameters(weight if start in FROM_WEIGHT else None)
    return adapter
