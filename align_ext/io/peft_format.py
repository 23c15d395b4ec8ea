"""What PEFT knows of an adapter: one A and one B a layer, and the options in adapter_config.json."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from align_ext.adapters.base import Adapter
from align_ext.alignment.model_state import AlignState
from align_ext.base_model.adopt_peft import BASE_UNTOUCHED, PEFT_PREFIX
from align_ext.config import AlignLoraConfig
from align_ext.system.bounds import is_number
from align_ext.system.reading import Matcher, line, reason_of, shown, shown_path

WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
TASKS = "tasks"  # a folder for each task is in it
_R, _ALPHA = 8, 8  # PEFT's defaults
# Options that treat layers unlike each other; of ours form.options has those that there are.
BY_LAYER = ("rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "exclude_modules")
# What does not make an adapter another one, and what is read below; any further option that is set makes it one.
_UNDERSTOOD = (
    "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type", "inference_mode", "r",
    "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "modules_to_save", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_config",
    "megatron_core", "loftq_config", "eva_config", "corda_config", "qalora_group_size", "runtime_config",
    "ensure_weight_tying",
)  # fmt: skip


@dataclass(frozen=True)
class PeftForm:
    """An adapter as PEFT reads it.

    Attributes:
        tensors: by PEFT's keys, which vLLM reads too.
        options: r, lora_alpha, use_rslora and, where layers differ, rank_pattern and alpha_pattern; modules_to_save.
    """

    tensors: dict[str, Tensor]
    options: dict[str, Any]


def unexportable_reason(adapters: Mapping[str, Adapter], config: AlignLoraConfig) -> str | None:
    """Why PEFT has no form of these adapters, or None."""
    if config.target_blocks:
        return "its adapters stand beside whole blocks, which PEFT does not know"
    return next(iter(adapters.values())).unmergeable_reason()


def is_plain(adapters: Mapping[str, Adapter], config: AlignLoraConfig) -> bool:
    """Whether PEFT's form holds all there is: one A and one B in each layer, scaled alike."""
    return one_lora(config) and _alike(adapters, config)


def one_lora(config: AlignLoraConfig) -> bool:
    """Whether a layer's adapter is one A and one B, without heads, tasks or an offset."""
    plain = config.architecture in ("lora", "align_lora") and config.init_lora_weights != "pissa"
    return plain and not config.target_blocks


def peft_forms(
    adapters: Mapping[str, Adapter],
    config: AlignLoraConfig,
    task_names: Sequence[str] = (),
    trained: Mapping[str, Tensor] | None = None,
) -> dict[str, PeftForm]:
    """The adapters' forms for PEFT, by the place below the folder; none where they have none.

    With an adapter for each task there is one form a task, in tasks/<its name or number>; else one, in the folder.
    Each holds what is trained beside the adapters too, by name in the plain model.
    """
    if config.architecture != "multi_adapter":
        return {} if unexportable_reason(adapters, config) else {"": peft_form(adapters, config, trained)}
    if config.target_blocks:
        return {}
    assert config.num_tasks is not None
    forms = {}
    for task, name in enumerate(task_names or map(str, range(config.num_tasks))):
        with named_task(adapters, task):
            forms[f"{TASKS}/{name}"] = peft_form(adapters, config, trained)
    return forms


def peft_form(
    adapters: Mapping[str, Adapter], config: AlignLoraConfig, trained: Mapping[str, Tensor] | None = None
) -> PeftForm:
    """The adapters' one form for PEFT: terms s Σ_k B_k A_k become s [B_1 B_2] [A_1; A_2] of the sum of their ranks.

    PEFT divides alpha by that rank (by its root with rslora), so alpha grows with it. Where layers differ in rank or
    scaling, s goes into B and alpha is the rank, since vLLM reads no alpha of single layers.
    """
    alike, tensors, ranks, times = _alike(adapters, config), {}, {}, 1
    for name, adapter in adapters.items():
        terms = adapter.delta_factors()
        B = torch.cat([B.detach() for _, B in terms], 1)
        A = torch.cat([A.detach() for A, _ in terms]).to(B.dtype)
        times, ranks[name] = len(terms), A.shape[0]
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = A
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = B if alike else B * adapter.scaling
    tensors |= {f"{PEFT_PREFIX}{name}": tensor.detach() for name, tensor in (trained or {}).items()}
    if alike:
        alpha = config.lora_alpha * (math.sqrt(times) if config.use_rslora else times)
        return PeftForm(tensors, {"r": times * config.r, "lora_alpha": alpha, "use_rslora": config.use_rslora})
    r = max(ranks.values())
    one = {"r": r, "lora_alpha": r, "use_rslora": False}
    return PeftForm(tensors, one | {"rank_pattern": ranks, "alpha_pattern": dict(ranks)})


@contextmanager
def named_task(adapters: Mapping[str, Adapter], task: int) -> Iterator[None]:
    """Makes `task` the one that a multi_adapter's terms are about."""
    state: AlignState | None = next(iter(adapters.values())).state
    assert state is not None
    before, state.task = state.task, task
    try:
        yield
    finally:
        state.task = before


def plain_lora(file: Path, peft: Mapping[str, Any], modules: Sequence[str]) -> AlignLoraConfig:
    """Our options for a folder of stock PEFT, adapting these modules.

    Raises:
        ValueError: it is no plain LoRA; the message names the option.
    """
    odd = ["peft_type"] * (peft.get("peft_type") != "LORA") + ["bias"] * (peft.get("bias", "none") != "none")
    start = peft.get("init_lora_weights")
    odd += ["init_lora_weights"] * (start not in BASE_UNTOUCHED)
    others = (*_UNDERSTOOD, "peft_type", "bias", "init_lora_weights")
    odd += [option for option, value in peft.items() if value and option not in others]
    if odd:
        raise ValueError(f"{shown_path(file)}: {line(odd[0], 80)}={shown(peft.get(odd[0]))} is not plain LoRA")
    names = ("r", "lora_alpha", "lora_dropout", "use_rslora")
    given = {"r": _R, "lora_alpha": _ALPHA, "lora_dropout": 0.0, "target_modules": tuple(modules) or ("none",)}
    try:
        return AlignLoraConfig.from_dict({"architecture": "lora"} | given | {n: peft[n] for n in names if n in peft})
    except (ValueError, TypeError) as error:
        raise ValueError(f"{shown_path(file)}: {error}") from error


def scalings(file: Path, peft: Mapping[str, Any], ranks: Mapping[str, int]) -> dict[str, float]:
    """The scaling that PEFT gives each layer.

    Args:
        file: the adapter_config.json.
        peft: its content.
        ranks: of the layers' lora_A.

    Raises:
        ValueError: its options mean other ranks, or are no numbers.
    """
    matcher, result = Matcher(), {}
    for name, r in ranks.items():
        expected = _by_pattern(matcher, peft, "rank_pattern", name, peft.get("r", _R))
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
    """Compares the layers whose weights a PEFT folder holds with those that its target_modules names.

    Args:
        file: the adapter_config.json.
        peft: its content.
        held: the layers.
        layers: of the model; None: it is not known, nor whether a layer is missing.

    Raises:
        ValueError: weights that PEFT would leave alone, or layers without weights.
    """
    targets, matcher, layers = peft.get("target_modules"), Matcher(), list(held if layers is None else layers)
    if targets is None:  # what PEFT does then depends on the kind of model
        return
    try:
        extra = [name for name in held if not _is_target(matcher, peft, name)]
        missing = [name for name in layers if name not in set(held) and _is_target(matcher, peft, name)]
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


def _is_target(matcher: Matcher, peft: Mapping[str, Any], name: str) -> bool:
    """PEFT's rule: a string is a regular expression for the whole name, a list holds names or their last parts."""

    def fits(option: str) -> bool:
        patterns = peft.get(option) or []
        if isinstance(patterns, str):
            return patterns == "all-linear" or matcher.matches(patterns, name)
        if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
            raise ValueError(f"{option}={shown(patterns)} is no list of names")
        return name in patterns or any(name.endswith(f".{pattern}") for pattern in patterns)

    whole = any(f".{module}." in f".{name}." for module in peft.get("modules_to_save") or ())
    if whole or not fits("target_modules") or fits("exclude_modules"):
        return False
    only, targets = peft.get("layers_to_transform"), peft["target_modules"]
    if only in (None, []) or isinstance(targets, str) or name in targets:
        return True
    index = re.search(r"\.(\d+)\.", name)  # the layer's, which comes first
    return index is not None and int(index[1]) in (only if isinstance(only, list) else [only])


def _by_pattern(matcher: Matcher, peft: Mapping[str, Any], option: str, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the name."""
    patterns = peft.get(option) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{option}={shown(patterns)} is none: it maps names to numbers")
    try:
        return next((x for p, x in patterns.items() if p == name or matcher.matches(p, name, end=True)), default)
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _alike(adapters: Mapping[str, Adapter], config: AlignLoraConfig) -> bool:
    return all(adapter.r == config.r and adapter.scaling == config.scaling for adapter in adapters.values())
