"""Takes over the LoRA layers of a PeftModel: the same Parameters, the same scaling."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.adapters.embedding import AdaptedEmbedding, EmbeddingAdapter
from align_ext.adapters.linear_layer import features_of
from align_ext.adapters.lora import LoraAdapter
from align_ext.config import AlignLoraConfig

PEFT_PREFIX = "base_model.model."  # PEFT's name for the plain model inside a PeftModel
BASE_UNTOUCHED = (None, True, False, "gaussian", "orthogonal", "eva")  # initialisations that keep the base weight
_INIT = "init_lora_weights"


def is_peft_lora(module: nn.Module) -> bool:
    """Whether a module is one of PEFT's LoRA layers."""
    return type(module).__module__.startswith("peft.tuners.lora") and hasattr(module, "base_layer")


def refuse_peft_layers(model: nn.Module) -> None:
    """Raises ValueError if a model with adapters also has adapters of PEFT, which would not be saved."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            raise ValueError(
                f"{name} has an adapter of PEFT's own, which is none of the model's and would not come back: call "
                "replace_linear_with_align_lora on the PeftModel, which adopts its layers, or take PEFT's off first"
            )


def unadoptable_reason(module: Any) -> str | None:
    """Returns why a PEFT LoRA layer cannot be adopted, or None."""
    if len(module.active_adapters) != 1 or len(module.lora_A) + len(module.lora_embedding_A) != 1:
        return "it has several PEFT adapters, or none is active, and one can be adopted: delete_adapter the others"
    adapter = module.active_adapters[0]
    if module.merged:
        return "its PEFT adapter is merged: unmerge it first"
    if module.disable_adapters:
        return "its PEFT adapter is disabled: enable it first"
    if hasattr(module, "parameter_name"):
        return (
            "its PEFT adapter is one of target_parameters, whose parameters have another form there: save it by "
            "save_pretrained, and load the folder into the base model by load_adapter"
        )
    linear = adapter in module.lora_A and isinstance(module.lora_A[adapter], nn.Linear)
    if not linear and not isinstance(module.base_layer, nn.Embedding):
        return "its PEFT adapter is not one of a linear layer or an embedding (but of a convolution)"
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None and type(variant).__name__ not in ("DoraLinearVariant", "DoraEmbeddingVariant"):
        return f"its PEFT adapter is a variant ({type(variant).__name__}) that plain LoRA cannot take over"
    return None


def refuse_unadoptable(model: nn.Module, targets: Mapping[str, Any], skipped: Mapping[str, str]) -> dict[str, Any]:
    """Raises if adopting a PeftModel would freeze, lose or change the meaning of any part of it.

    Args:
        model: the PeftModel, or the model into which PEFT put its layers.
        targets: the LoRA layers that can be adopted, by name.
        skipped: why other layers cannot be adopted, by name.

    Returns:
        PEFT's wrappers of the fully trained modules (modules_to_save), by name.
    """
    for name, reason in skipped.items():
        raise ValueError(f"{name} cannot be adopted, and its change would be lost: {reason}")
    full_modules: dict[str, Any] = {}
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.") and hasattr(module, "original_module"):
            if len(getattr(module, "modules_to_save", ())) != 1 or module.disable_adapters:
                raise ValueError(
                    f"PEFT trains {name} in a way that cannot be adopted (trainable_token_indices, several adapters, "
                    "one that is off): save it (save_pretrained), and load_adapter the folder into the base model"
                )
            full_modules[name] = module
    adopted = {id(p) for module in full_modules.values() for p in module.parameters()}
    adopted |= {id(p) for m in targets.values() for n, p in m.named_parameters() if not n.startswith("base_layer.")}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in adopted:
            raise ValueError(
                f"the PeftModel also trains {name}, which adopting would freeze: remove it from the PEFT "
                "configuration, or freeze it first"
            )
    return full_modules


def adopt_full_modules(model: nn.Module, full_modules: Mapping[str, Any]) -> dict[str, Tensor]:
    """Replaces PEFT's wrappers of fully trained modules by the trained modules.

    Returns:
        The original tensors of the base model, by name in the plain model.
    """
    originals = {}
    for name, wrapper in full_modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, next(iter(wrapper.modules_to_save.values())))
        for part, tensor in wrapper.original_module.state_dict().items():
            originals[f"{name.removeprefix(PEFT_PREFIX)}.{part}"] = tensor
    return originals


def refuse_other_peft(model: nn.Module) -> None:
    """Raises if a model has a PEFT adapter that is not plain LoRA on unchanged base weights."""
    for module in model.modules():
        configs = getattr(module, "peft_config", None)
        for name, config in configs.items() if isinstance(configs, Mapping) else ():
            kind, init = str(getattr(config.peft_type, "value", config.peft_type)), getattr(config, _INIT, True)
            if kind != "LORA":
                raise ValueError(
                    f"the model has a PEFT adapter {name!r} of type {kind}, which cannot be adopted: adapt the base "
                    "model (peft_model.unload())"
                )
            if init not in BASE_UNTOUCHED:
                raise ValueError(
                    f"the PEFT adapter {name!r} has {_INIT}={init!r}, which changes more than A and B (the base "
                    "weights), so that an adopted adapter's folder would not fit the base model: start from the base "
                    f'model with replace_linear_with_align_lora(model, {_INIT}="pissa"), or have PEFT save plain '
                    "LoRA (save_pretrained(..., path_initial_model_for_weight_conversion=...)) and adopt that"
                )
            if (bias := getattr(config, "bias", "none")) != "none":
                raise ValueError(
                    f"the PEFT adapter {name!r} has bias={bias!r}: it changes biases of the base model, whose values "
                    "of before are not known any more: save it (save_pretrained), and load_adapter the folder into the "
                    "base model"
                )
            if getattr(config, "layer_replication", None):
                raise ValueError(
                    f"the PEFT adapter {name!r} has layer_replication={config.layer_replication!r}: its layers are "
                    "not those of the base model, and cannot be adopted"
                )


def adopted_config(config: AlignLoraConfig, targets: Mapping[str, Any]) -> AlignLoraConfig:
    """Returns the options with the rank, scaling, dropout and layers of the PEFT adapter.

    Raises:
        ValueError: a plain LoRA adapter cannot become this architecture.
    """
    if config.architecture not in ("lora", "align_lora") or config.target_blocks:
        raise ValueError(
            f"architecture={config.architecture!r}, target_blocks={config.target_blocks!r}: a PEFT adapter is one LoRA "
            "a layer, adopted as lora or align_lora"
        )
    module = next(iter(targets.values()))
    adapter = module.active_adapters[0]
    r = _factors(module)[0].shape[0]
    return replace(
        config,
        r=r,
        lora_alpha=module.scaling[adapter] * r,
        use_rslora=False,
        use_dora=bool(module.use_dora.get(adapter)),
        lora_dropout=getattr(module.lora_dropout[adapter], "p", 0.0),
        target_modules=tuple(name.removeprefix(PEFT_PREFIX) for name in targets),
        target_parameters=(),
        target_blocks=(),
        rank_pattern={},
        alpha_pattern={},
        layers_to_transform=(),
        layers_pattern=(),
        init_lora_weights="kaiming",
        lora_bias=any(_factors(one)[2] is not None for one in targets.values()),
    )


def adopt(module: Any, config: AlignLoraConfig) -> AdaptedLinear:
    """Adopts a PEFT LoRA layer: its base layer, the same Parameters, its scaling and dropout."""
    name, (A, B, bias) = module.active_adapters[0], _factors(module)
    is_embedding, sizes = isinstance(module.base_layer, nn.Embedding), features_of(module.base_layer)
    with torch.device("meta"):
        adapter: Any = (EmbeddingAdapter if is_embedding else LoraAdapter)(replace(config, r=A.shape[0]), *sizes)
    if is_embedding:
        adapter.lora_embedding_A, adapter.lora_embedding_B = A, B
    else:
        adapter.lora_A, adapter.lora_B, adapter.lora_bias = A, B, bias
    if config.use_dora:
        adapter.lora_magnitude_vector = module.lora_magnitude_vector[name].weight
    adapter.scaling, adapter.dropout_p = module.scaling[name], getattr(module.lora_dropout[name], "p", 0.0)
    return (AdaptedEmbedding if is_embedding else AdaptedLinear)(module.base_layer, adapter)


def _factors(module: Any) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter | None]:
    """Returns A, B and the bias of B of a PEFT LoRA layer."""
    name = module.active_adapters[0]
    if isinstance(module.base_layer, nn.Embedding):
        return module.lora_embedding_A[name], module.lora_embedding_B[name], None
    return module.lora_A[name].weight, module.lora_B[name].weight, module.lora_B[name].bias
