"""Finds the tensors of a mixture's experts that target_parameters names, and refuses what is none."""

from collections.abc import Collection
from typing import Any

from torch import nn

from align_ext.adapters.adapted_experts import up_name
from align_ext.alignment.sources import encoder_decoder
from align_ext.base_model.modules_to_save import is_inside
from align_ext.config import AlignLoraConfig
from align_ext.system.messages import shown

_FLAGS = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm")


def expert_tensors(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the experts modules of transformers' interface by the names of their tensors, in the model's order."""
    return {
        f"{name}.{tensor}": module
        for name, module in model.named_modules()
        if all(hasattr(module, flag) for flag in _FLAGS) and hasattr(type(module), "_apply_gate")
        for tensor in (up_name(module), "down_proj")
        if name and len(_shape(module._parameters.get(tensor))) == 3
    }


def find_expert_tensors(
    model: nn.Module, config: AlignLoraConfig, fully_trained: Collection[str] = ()
) -> dict[str, nn.Module]:
    """Returns the experts modules by the names of the tensors that target_parameters names, as PEFT reads it.

    Args:
        model: the model.
        config: the options.
        fully_trained: names of fully trained modules.

    Raises:
        ValueError: an entry names no parameter, or one that cannot be adapted; the message says why.
    """
    tensors, found = expert_tensors(model) if config.target_parameters else {}, dict[str, nn.Module]()
    for target in config.target_parameters:
        matching = [n for n, _ in model.named_parameters() if n == target or n.endswith(f".{target}")]
        if not matching:
            known = shown(list(tensors)[:4]) if tensors else "none: quantised experts have no tensor to adapt"
            raise ValueError(
                f"target_parameters: {target!r} matches no parameter of the model; its experts' tensors are {known}"
            )
        for name in matching:
            reason = _unfit_reason(name, tensors.get(name))
            if reason is None and is_inside(name, fully_trained):
                reason = "it is trained whole (modules_to_save)"
            if reason is not None:
                raise ValueError(f"target_parameters: {target!r} matches {name}, which cannot be adapted: {reason}")
            found[name] = tensors[name]
    return {name: module for name, module in tensors.items() if name in found}


def sizes_of(experts: Any, tensor: str) -> tuple[int, int, int]:
    """(in_features, out_features, experts) of a tensor of experts."""
    number, out_features, in_features = _shape(getattr(experts, tensor))
    sizes = (out_features, in_features) if experts.is_transposed else (in_features, out_features)
    return *sizes, number


def _shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a whole parameter, also of one that ZeRO-3 has in parts; of none, ()."""
    return tuple(getattr(parameter, "ds_shape", getattr(parameter, "shape", ())))


def aligns_experts(model: nn.Module, config: AlignLoraConfig) -> bool:
    """Whether the rows of experts take part in the alignment: where a loss takes the tokens of each layer as they are.

    MMD and statistics by position compare the same tokens in all layers, and an encoder-decoder's experts may be in
    either part.
    """
    by_layer = config.align in ("kl", "l2") and config.align_statistics == "token"
    return by_layer and encoder_decoder(model) is None


def hints_of_experts(model: nn.Module, config: AlignLoraConfig, adapted: Collection[str]) -> list[str]:
    """Returns hints on tensors of experts that are not adapted, or adapted and not aligned."""
    others = [name for name, p in model.named_parameters() if p.dim() == 3 and "expert" in name and name not in adapted]
    lines = []
    if others:
        cure = ": target_parameters adapts them" if others[0] in expert_tensors(model) else ""
        lines.append(
            f"{len(others)} tensors of experts, such as {others[0]}, are no linear layers and stay as they are{cure}"
        )
    if adapted and config.align and not aligns_experts(model, config):
        lines.append(
            f'{len(adapted)} tensors of experts are adapted, but not aligned: align="kl" or "l2" over tokens aligns '
            "them, in a model that is no encoder-decoder"
        )
    return lines


def _unfit_reason(name: str, experts: Any) -> str | None:
    if experts is None:
        return (
            "only the tensors of experts in the form of transformers' experts interface are, which this is none of; "
            "a linear layer is named in target_modules"
        )
    weight: Any = experts._parameters[name.rpartition(".")[2]]
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() < 2:
        return "it is quantised or in parts: load the base in a floating-point dtype, in one process"
    if experts._is_expert_parallel:
        return "its experts are divided among processes: load the model without expert parallelism"
    if weight.is_meta and hasattr(experts, "_hf_hook"):
        return "it is offloaded: load the model on one device, or leave the tensor out"
    return None
