"""Selects the layers of a model that the options name, and gives the reason for each that cannot be adapted."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from typing import Literal

from torch import nn

from align_ext.adapters.embedding import unsuitable_embedding
from align_ext.adapters.linear_layer import has_float_weight, is_conv1d
from align_ext.base_model.adopt_peft import is_peft_lora, unadoptable_reason
from align_ext.base_model.bypassed_layers import bypass_reason
from align_ext.base_model.modules_to_save import is_inside
from align_ext.config import AlignLoraConfig
from align_ext.option_rules import as_tuple
from align_ext.system.messages import shown
from align_ext.system.names import Matcher, layer_index

ALL_LINEAR = "all-linear"


def find_targets(
    model: nn.Module,
    config: AlignLoraConfig,
    candidates: Mapping[str, nn.Module],
    skipped: dict[str, str],
    fully_trained: Collection[str],
    *,
    by_name: bool,
    ranked: Collection[str] = (),
) -> dict[str, nn.Module]:
    """Finds the layers to adapt.

    Args:
        model: the model.
        config: the options.
        candidates: its linear layers and embeddings by name.
        skipped: gets the reasons of those that match but cannot be adapted, by name.
        fully_trained: names of fully trained modules.
        by_name: whether target_modules and exclude_modules choose among the candidates.
        ranked: names of layers that are adapted whatever else is trained in them.
    """
    targets, matcher, names = {}, Matcher(), registered_names(model)
    for name, module in candidates.items():
        if by_name and not _matches(matcher, name, config, module, model):
            continue
        trained = is_inside(f"{name}.", fully_trained) and name not in ranked
        reason = "it is trained whole (modules_to_save)" if trained else _skip_reason(name, module, model, names)
        if reason is None and isinstance(module, nn.Embedding):
            reason = _embedding_reason(module, config)
        if reason is None:
            targets[name] = module
        else:
            skipped[name] = reason
    return targets


def _embedding_reason(module: nn.Embedding, config: AlignLoraConfig) -> str | None:
    """Returns why an embedding cannot be adapted with these options, or None."""
    beyond = config.init_lora_weights == "pissa" or config.lora_bias
    if config.architecture not in ("lora", "align_lora") or beyond:
        return "embeddings are adapted by lora and align_lora alone, without lora_bias and pissa"
    unsuitable = unsuitable_embedding(module)
    return unsuitable and f"it {unsuitable}"


def adaptable_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every linear layer and every embedding by name, without those inside PEFT's layers."""
    found = dict(linear_layers(model))
    inside = tuple(f"{name}." for name, module in found.items() if is_peft_lora(module))
    embeddings = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Embedding))
    return found | {name: module for name, module in embeddings if not name.startswith(inside)}


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields every linear layer, including quantised ones and PEFT's, but not the layers inside PEFT's."""
    skipped_prefixes: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(skipped_prefixes):
            continue
        if is_peft_lora(module):
            skipped_prefixes = (*skipped_prefixes, f"{name}.")
            yield name, module
        elif is_linear(module):
            yield name, module


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer: nn.Linear and its subclasses, GPT-2's Conv1D, quantised ones."""
    return isinstance(module, nn.Linear) or is_conv1d(module) or _is_quantised_linear(module)


def _is_quantised_linear(module: nn.Module) -> bool:
    """Whether a module looks like a linear layer with a packed weight (GPTQ, AWQ, HQQ, ...)."""
    return (
        hasattr(module, "in_features")
        and hasattr(module, "out_features")
        and not isinstance(module, (nn.Bilinear, nn.LazyLinear))
        and not list(module.children())
        and not has_float_weight(module)
    )


def name_matches(matcher: Matcher, name: str, patterns: tuple[str, ...] | str) -> bool:
    """Applies PEFT's rule: a string is a regular expression for the whole name, a list holds names or name suffixes."""
    if isinstance(patterns, str):
        return matcher.matches(patterns, name)
    return any(name == pattern or name.endswith(f".{pattern}") for pattern in patterns)


def _matches(matcher: Matcher, name: str, config: AlignLoraConfig, module: nn.Module, model: nn.Module) -> bool:
    if name_matches(matcher, name, config.exclude_modules):
        return False
    by_layer = config.layers_to_transform and name not in as_tuple(config.target_modules)  # as in PEFT
    if by_layer and layer_index(name, config.layers_pattern) not in config.layers_to_transform:
        return False
    if all_linear(config):
        return module is not embeddings_of(model, "output") and not isinstance(module, nn.Embedding)
    return name_matches(matcher, name, config.target_modules)


def all_linear(config: AlignLoraConfig) -> bool:
    """Whether target_modules is "all-linear"."""
    return config.target_modules in (ALL_LINEAR, (ALL_LINEAR,))


def embeddings_of(model: nn.Module, which: Literal["input", "output"]) -> nn.Module | None:
    """Returns a model's input embeddings or its output head, or None."""
    get = getattr(model, f"get_{which}_embeddings", None)
    try:
        return get() if get is not None else None
    except (NotImplementedError, AttributeError):
        return None


def registered_names(model: nn.Module) -> dict[int, list[str]]:
    """Returns the names of each module and parameter by id; a name inside a shared module counts once."""
    names = defaultdict(list)
    for name, module in model.named_modules():
        for child, part in (*module._modules.items(), *module._parameters.items()):
            names[id(part)].append(f"{name}.{child}" if name else child)
    return names


def _skip_reason(name: str, module: nn.Module, model: nn.Module, names: Mapping[int, list[str]]) -> str | None:
    """Returns why a matching layer cannot be adapted, or None."""
    if reason := bypass_reason(name, model):
        return reason
    others = [other_name for other_name in names[id(module)] if other_name != name]
    if others:
        return f"it is also at {others[0]}, which would stay as it is"
    if is_peft_lora(module):
        return unadoptable_reason(module) or _skip_reason(f"{name}.base_layer", module.base_layer, model, names)  # type: ignore[arg-type]
    weight = getattr(module, "weight", None)
    if isinstance(weight, nn.Parameter):
        if weight.is_meta and not hasattr(module, "_hf_hook") and _is_offloaded_with(name, model):
            return "its weight is offloaded together with its parent's: offload layer by layer instead"
        others = _tied_to(name, module, names)
        if others and module not in _token_modules(model):
            return f"its weight is tied to {others[0] or 'the model'}"
        tables = [other for other in others if isinstance(model.get_submodule(other), nn.Embedding)]
        if tables and isinstance(module, nn.Embedding):
            return (
                f"its weight is that of {tables[0]} too, and nothing says which of the two the model calls: train "
                "rows of it (trainable_token_indices) or all of it (modules_to_save)"
            )
    return None


def tied_to(name: str, module: nn.Module, names: Mapping[int, list[str]]) -> str | None:
    """Returns the name of another module that holds a module's weight, or None."""
    return next((owner or "the model" for owner in _tied_to(name, module, names)), None)


def _tied_to(name: str, module: nn.Module, names: Mapping[int, list[str]]) -> list[str]:
    weight = module._parameters.get("weight")
    owners = [] if weight is None else [one.rpartition(".")[0] for one in names[id(weight)]]
    return [owner for owner in owners if owner not in (name, f"{name}.base_layer")]


def _token_modules(model: nn.Module) -> list[nn.Module]:
    """Returns a model's input embeddings and its output head, below PEFT's layers."""
    found = [embeddings_of(model, which) for which in ("input", "output")]
    return [getattr(module, "base_layer", module) for module in found if module is not None]


def _is_offloaded_with(name: str, model: nn.Module) -> bool:
    """Whether a hook of an ancestor (accelerate) loads a layer's weight."""
    parts = name.split(".")
    ancestors = (model.get_submodule(".".join(parts[:i])) for i in range(len(parts)))
    return any(getattr(getattr(m, "_hf_hook", None), "place_submodules", False) for m in ancestors)


def unmatched_hints(
    config: AlignLoraConfig, candidates: Mapping[str, nn.Module], targets: Collection[str], skipped: Mapping[str, str]
) -> list[str]:
    """Returns hints about what was not adapted: patterns without a match, or of whose matches none is adapted."""
    hints, matcher = [], Matcher()
    for pattern in () if isinstance(config.target_modules, str) or all_linear(config) else config.target_modules:
        matched = [name for name in candidates if name_matches(matcher, name, (pattern,))]
        reasons = [f"{name} is left alone: {skipped[name]}" for name in matched if name in skipped]
        if not matched:
            hints.append(f"target_modules: {pattern!r} matches no linear layer")
        elif not set(matched).intersection(targets):
            hints.append(f"target_modules: {pattern!r} adapts no layer: {[*reasons, _left_out(config)][0]}")
    return hints


def _left_out(config: AlignLoraConfig) -> str:
    """Returns which options leave layers out that target_modules names."""
    options = ("exclude_modules", "layers_to_transform", "layers_pattern")
    given = [f"{name}={shown(getattr(config, name))}" for name in options if getattr(config, name)]
    return f"{' with '.join(given)} leaves out all that it names"


def nothing_matched_message(
    model: nn.Module, candidates: Mapping[str, nn.Module], config: AlignLoraConfig, skipped: Mapping[str, str]
) -> str:
    """Returns the message that no layer was adapted; it lists the linear layers of the model."""
    kinds = Counter(name.rpartition(".")[2] for name, m in candidates.items() if not isinstance(m, nn.Embedding))
    found = ", ".join(f"{kind} ({count})" for kind, count in sorted(kinds.items())) or "none at all"
    reasons = "".join(f"; {name} matched, but {reason}" for name, reason in list(skipped.items())[:5])
    everything, matcher = replace(config, exclude_modules=(), layers_to_transform=(), layers_pattern=()), Matcher()
    named = everything != config and any(_matches(matcher, n, everything, m, model) for n, m in candidates.items())
    if named and not skipped:
        reasons = f", since {_left_out(config)}"
    return (
        f"no layer was adapted: target_modules={shown(config.target_modules)} matches no linear layer that can "
        f"be{reasons}. "
        f'The model has these linear layers: {found}; or use target_modules="all-linear"'
    )
