"""PEFT's format of an adapter: one A and one B per layer, and the options in adapter_config.json."""

import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from align_ext.adapters.adapted_experts import ExpertsLora
from align_ext.adapters.base import Adapter
from align_ext.adapters.embedding import EmbeddingAdapter
from align_ext.alignment.model_state import AlignState
from align_ext.base_model.adopt_peft import BASE_UNTOUCHED, PEFT_PREFIX
from align_ext.config import AlignLoraConfig
from align_ext.io import peft_adalora
from align_ext.io.peft_adalora import ADALORA
from align_ext.io.peft_experts import flattened, is_named, peft_keys, unflattened
from align_ext.system.bounds import is_number
from align_ext.system.messages import line, reason_of, shown, shown_path
from align_ext.system.names import Matcher, layer_index

WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASKS = "tasks"  # the folder that holds one folder per task
_RANK, _ALPHA = 8, 8  # PEFT's defaults
# PEFT's options for single layers; PeftForm.options holds those that we write.
BY_LAYER = (
    "target_parameters", "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules",
)  # fmt: skip
# Options that do not change a plain LoRA adapter, and options that are read below; any other option is refused.
_SUPPORTED = (
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "target_modules", "target_parameters", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out",
    "use_rslora", "use_dora", "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern",
    "alpha_pattern", "megatron_config", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip


@dataclass(frozen=True)
class PeftForm:
    """An adapter in PEFT's format.

    Attributes:
        tensors: the tensors by PEFT's keys, which vLLM and llama.cpp's converter read too.
        options: r, lora_alpha, use_rslora, use_dora, lora_bias, trainable_token_indices, target_parameters of experts
            and, if layers differ, rank_pattern and alpha_pattern.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]


def unexportable_reason(adapters: Mapping[str, Adapter], config: AlignLoraConfig) -> str | None:
    """Returns why PEFT's format cannot hold these adapters, or None."""
    if config.target_blocks:
        return "its adapters stand beside whole blocks, which PEFT does not know"
    return next(filter(None, (adapter.unmergeable_reason() for adapter in adapters.values())), None)


def is_plain(adapters: Mapping[str, Adapter], config: AlignLoraConfig) -> bool:
    """Whether PEFT's format holds everything: one A and B in each layer, with the rank and scaling of the options."""
    return one_lora(config) and _is_uniform(adapters, config)


def one_lora(config: AlignLoraConfig) -> bool:
    """Whether PEFT has a form of a layer's adapter itself: one A and one B, or P, Λ and Q of AdaLoRA."""
    plain = config.architecture in ("lora", "align_lora", "adalora") and config.init_lora_weights != "pissa"
    return plain and not config.target_blocks


def peft_forms(
    adapters: Mapping[str, Adapter],
    config: AlignLoraConfig,
    task_names: Sequence[str] = (),
    trained: Mapping[str, Tensor] | None = None,
) -> dict[str, PeftForm]:
    """Returns the adapters in PEFT's format, by subfolder; empty if PEFT's format cannot hold them.

    An adapter by task has one form per task, in tasks/<its name or number>; others have one, in the folder. That of
    adalora is PEFT's AdaLoRA (io/peft_adalora.py), that of all others LoRA. Each form also holds the tensors that are
    trained beside the adapters, by name in the plain model.
    """
    if not config.row.by_task:
        form = adalora_form if config.architecture == "adalora" else peft_form
        return {} if unexportable_reason(adapters, config) else {"": form(adapters, config, trained)}
    if config.target_blocks:
        return {}
    assert config.num_tasks is not None
    forms = {}
    for task, name in enumerate(task_names or map(str, range(config.num_tasks))):
        with selected_task(adapters, task):
            forms[f"{TASKS}/{name}"] = peft_form(adapters, config, trained)
    return forms


def peft_form(
    adapters: Mapping[str, Adapter], config: AlignLoraConfig, trained: Mapping[str, Tensor] | None = None
) -> PeftForm:
    """Returns the adapters in PEFT's format: terms s Σ_k B_k A_k become s [B_1 B_2] [A_1; A_2] of the total rank.

    PEFT divides alpha by that rank (its square root with rslora), so alpha grows with it. If layers differ in rank or
    scaling, B is multiplied by s and alpha is the rank.
    """
    uniform, tensors, ranks, count = _is_uniform(adapters, config), dict[str, Tensor](), dict[str, int](), 1
    experts, _ = by_kind(adapters)
    keys = peft_keys(adapters, experts)
    parameters: dict[str, Any] = {"target_parameters": experts} if experts else {}
    for name, adapter in adapters.items():
        terms = adapter.delta_factors()
        B = torch.cat([B.detach() for _, B in terms], 1)
        A = torch.cat([A.detach() for A, _ in terms]).to(B.dtype)
        count, ranks[name] = len(terms), A.shape[-2]
        A, B = flattened(A, B if uniform else B * adapter.scaling)
        key = f"{keys[name]}.lora_" + ("embedding_{}" if isinstance(adapter, EmbeddingAdapter) else "{}.weight")
        tensors |= {key.format("A"): A, key.format("B"): B}
        if adapter.lora_magnitude_vector is not None:
            tensors[f"{PEFT_PREFIX}{name}.lora_magnitude_vector"] = adapter.lora_magnitude_vector.detach()
    tensors |= {base_key(name, adapters): tensor.detach() for name, tensor in (trained or {}).items()}
    biases = {name: adapter.lora_bias.detach() for name, adapter in adapters.items() if adapter.lora_bias is not None}
    for name, b in biases.items():
        tensors[f"{PEFT_PREFIX}{name}.lora_B.bias"] = b if uniform else b * adapters[name].scaling
    more = {"use_dora": config.use_dora, "lora_bias": bool(biases), "trainable_token_indices": token_indices(config)}
    if uniform:
        alpha = config.lora_alpha * (math.sqrt(count) if config.use_rslora else count)
        one = {"r": count * config.r, "lora_alpha": alpha, "use_rslora": config.use_rslora}
        return PeftForm(tensors, one | more | parameters)
    r = max(ranks.values())
    one = {"r": r, "lora_alpha": r, "use_rslora": False} | more | parameters
    return PeftForm(tensors, one | {"rank_pattern": ranks, "alpha_pattern": dict(ranks)})


def adalora_form(
    adapters: Mapping[str, Adapter], config: AlignLoraConfig, trained: Mapping[str, Tensor] | None = None
) -> PeftForm:
    """Returns AdaLoRA's adapters in PEFT's form of them."""
    tensors, options = peft_adalora.form_of(adapters, config)
    tensors |= {base_key(name, adapters): tensor.detach() for name, tensor in (trained or {}).items()}
    return PeftForm(tensors, options | {"r": _RANK, "trainable_token_indices": token_indices(config)})


def token_indices(config: AlignLoraConfig) -> list[int] | dict[str, list[int]] | None:
    """Returns the rows of embeddings that are trained, in PEFT's form of the option."""
    rows = config.trainable_token_indices
    return ({name: list(tokens) for name, tokens in rows.items()} if isinstance(rows, Mapping) else list(rows)) or None


def base_key(name: str, layers: Container[str]) -> str:
    """Returns PEFT's key of a tensor of the base: an adapted layer's is that of its base_layer."""
    module, _, part = name.rpartition(".")
    return f"{PEFT_PREFIX}{f'{module}.base_layer.{part}' if module in layers else name}"


def refuse_dora(config: AlignLoraConfig) -> None:
    """Raises ValueError if adapters are DoRA, which neither vLLM nor llama.cpp reads."""
    if config.use_dora:
        raise ValueError(
            "use_dora=True: vLLM and llama.cpp read no DoRA: merge the adapter for them; PEFT reads the folder of "
            "save_adapter as it is"
        )


def portable(form: PeftForm) -> PeftForm:
    """Returns the same adapter with one rank, one alpha and s = alpha / r, the only scaling that llama.cpp knows.

    Smaller ranks are filled with zeros. Under rslora, s = alpha / sqrt(r), so alpha is multiplied by sqrt(r).
    """
    r, alpha, tensors = form.options["r"], form.options["lora_alpha"], dict(form.tensors)
    ranks, experts = form.options.get("rank_pattern") or {}, form.options.get("target_parameters") or []
    for name, key in peft_keys(ranks, experts).items():
        names = [f"{key}.lora_{part}.weight" for part in "AB"]
        names = names if names[0] in tensors else [f"{key}.lora_embedding_{part}" for part in "AB"]
        A, B = unflattened(tensors[names[0]], tensors[names[1]], ranks[name])
        more = r - ranks[name]
        tensors |= zip(names, flattened(functional.pad(A, (0, 0, 0, more)), functional.pad(B, (0, more))), strict=True)
    if form.options["use_rslora"]:
        alpha *= math.sqrt(r)
    others = {name: value for name, value in form.options.items() if name not in ("rank_pattern", "alpha_pattern")}
    return PeftForm(tensors, others | {"lora_alpha": alpha, "use_rslora": False})


def by_kind(adapters: Mapping[str, Adapter]) -> tuple[list[str], list[str]]:
    """Returns the names of the adapters of experts, and of the others."""
    experts = sorted(name for name, adapter in adapters.items() if isinstance(adapter, ExpertsLora))
    return experts, [name for name in adapters if name not in set(experts)]


@contextmanager
def selected_task(adapters: Mapping[str, Adapter], task: int) -> Iterator[None]:
    """Selects the task whose terms adapters by task return within the block."""
    state: AlignState | None = next(iter(adapters.values())).state
    assert state is not None
    before, state.task = state.task, task
    try:
        yield
    finally:
        state.task = before


def plain_lora_config(
    file: Path, peft: Mapping[str, Any], modules: Sequence[str], experts: Sequence[str] = ()
) -> AlignLoraConfig:
    """Returns our options for a folder of stock PEFT that adapts these modules and tensors of experts.

    Raises:
        ValueError: it is not plain LoRA; the message names the option.
    """
    adalora = peft.get("peft_type") == ADALORA
    refused = ["peft_type"] * (peft.get("peft_type") != "LORA" and not adalora)
    refused += ["bias"] * (peft.get("bias", "none") not in ("none", "all", "lora_only"))
    start = peft.get("init_lora_weights")
    refused += ["init_lora_weights"] * (start not in BASE_UNTOUCHED)
    others = (*_SUPPORTED, "peft_type", "bias", "lora_bias", "trainable_token_indices", "init_lora_weights")
    known = (*others, *peft_adalora.OPTIONS) if adalora else others
    refused += [option for option, value in peft.items() if value and option not in known]
    if refused:
        raise ValueError(f"{shown_path(file)}: {line(refused[0], 80)}={shown(peft.get(refused[0]))} is not plain LoRA")
    names = (
        "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "lora_bias", "trainable_token_indices",
    )  # fmt: skip
    options = {"r": _RANK, "lora_alpha": _ALPHA, "lora_dropout": 0.0, "target_parameters": tuple(experts)}
    options["target_modules"] = tuple(modules) or (() if experts else ("none",))
    try:
        options |= {"architecture": "lora"} | {name: peft[name] for name in names if name in peft}
        if adalora:  # which has init_r in the place of r, and one scaling
            options |= peft_adalora.options_of(peft) | {"use_rslora": False}
        return AlignLoraConfig.from_dict(options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shown_path(file)}: {error}") from error


def scalings(file: Path, peft: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """Returns the scaling that PEFT gives each layer, where it is not that of our options.

    Args:
        file: the adapter_config.json.
        peft: its content.
        ranks: the rank of each layer's lora_A.

    Raises:
        ValueError: the options give other ranks, or are no numbers.
    """
    matcher, result = Matcher(), {}
    if peft.get("peft_type") == ADALORA:
        return {}  # the options'
    for name, r in ranks.items():
        expected = rank_of(matcher, peft, name)
        if expected != r:
            raise ValueError(f"{shown_path(file)} has r={shown(expected)} for {name}, whose lora_A has {r} rows")
        alpha = _by_pattern(matcher, peft, "alpha_pattern", name, peft.get("lora_alpha", _ALPHA))
        if not is_number(alpha):
            raise ValueError(f"{shown_path(file)} has lora_alpha={shown(alpha)} for {name}, which is no number")
        result[name] = alpha / (math.sqrt(r) if peft.get("use_rslora") else r)
    return result


def check_targets(
    file: Path, peft: Mapping[str, Any], held: Sequence[str], layers: Iterable[str] | None = None
) -> None:
    """Checks that a PEFT folder holds weights of exactly the layers that its target_modules names.

    Args:
        file: the adapter_config.json.
        peft: its content.
        held: the layers with weights in the folder.
        layers: the layers of the model; None: the model is not known, so missing layers are not found.

    Raises:
        ValueError: there are weights that PEFT would ignore, or layers without weights.
    """
    targets, matcher, layers = peft.get("target_modules"), Matcher(), list(held if layers is None else layers)
    if targets is None:  # PEFT's default then depends on the model type
        return
    try:
        extra = [name for name in held if not is_target(matcher, peft, name)]
        missing = [name for name in layers if name not in set(held) and is_target(matcher, peft, name)]
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shown_path(file)}: {reason_of(error)}") from error
    if extra:
        raise ValueError(
            f"{shown_path(file)} has target_modules={shown(targets)}, which does not name {len(extra)} layers of which "
            f"there are weights, {shown(extra[:3])}"
        )
    if missing:
        raise ValueError(
            f"{shown_path(file.parent)} holds no weights of {len(missing)} layers that its "
            f"target_modules={shown(targets)} names in this model, {shown(missing[:3])}: some are "
            "lost, or it belongs to another model"
        )


def check_parameters(
    file: Path, peft: Mapping[str, Any], held: Sequence[str], tensors: Iterable[str] | None = None
) -> None:
    """Checks that a PEFT folder holds weights of exactly the tensors of experts that its target_parameters names.

    Args:
        file: the adapter_config.json.
        peft: its content.
        held: the tensors of experts with weights in the folder.
        tensors: those of the model; None: the model is not known, so missing ones are not found.

    Raises:
        ValueError: there are tensors without weights.
    """
    targets = peft.get("target_parameters") or []
    missing = [name for name in tensors or () if name not in set(held) and is_named(name, targets)]
    if missing:
        raise ValueError(
            f"{shown_path(file.parent)} holds no weights of {len(missing)} tensors that its "
            f"target_parameters={shown(targets)} names in this model, {shown(missing[:3])}: some are lost, or it "
            "belongs to another model"
        )


def is_target(matcher: Matcher, peft: Mapping[str, Any], name: str) -> bool:
    """Applies PEFT's rule: a string is a regular expression for the whole name, a list holds names or name suffixes."""

    def is_named(option: str) -> bool:
        patterns = peft.get(option) or []
        if isinstance(patterns, str):
            return patterns == "all-linear" or matcher.matches(patterns, name)
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"{option}={shown(patterns)} is no list of names")
        return name in patterns or any(name.endswith(f".{pattern}") for pattern in patterns)

    fully_trained = any(f".{module}." in f".{name}." for module in peft.get("modules_to_save") or ())
    if fully_trained or not is_named("target_modules") or is_named("exclude_modules"):
        return False
    only, targets = peft.get("layers_to_transform"), peft["target_modules"]
    if only in (None, []) or isinstance(targets, str) or name in targets:
        return True
    lists = peft.get("layers_pattern") or []
    index = layer_index(name, [lists] if isinstance(lists, str) else lists)
    return index is not None and index in (only if isinstance(only, list) else [only])


def rank_of(matcher: Matcher, peft: Mapping[str, Any], name: str) -> Any:
    """Returns the rank that a folder's options give a layer, whatever they hold."""
    return _by_pattern(matcher, peft, "rank_pattern", name, peft.get("r", _RANK))


def _by_pattern(matcher: Matcher, peft: Mapping[str, Any], option: str, name: str, default: Any) -> Any:
    """Applies PEFT's rule: the first pattern that matches the end of the name gives the value."""
    patterns = peft.get(option) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{option}={shown(patterns)} is none: it maps names to numbers")
    try:
        return matcher.value_of(patterns, name, default)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _is_uniform(adapters: Mapping[str, Adapter], config: AlignLoraConfig) -> bool:
    return all(adapter.r == config.r and adapter.scaling == config.scaling for adapter in adapters.values())
