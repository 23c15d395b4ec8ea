"""The models for training steps and decoding, frozen or with adapters of this package, PEFT or a baseline."""

from typing import Any

import torch
from torch import nn

from align_ext.architectures import ARCHITECTURES
from align_ext.base_model.load import load_model
from align_ext.bench.baselines import LORA, SEVERAL, Make, Sizes, compiled
from align_ext.bench.layers import FLOAT32, config
from align_ext.model.replace import replace_linear_with_align_lora

FROZEN = "frozen model"
TARGETS = ("gate_proj", "up_proj", "down_proj")
PEFT = "PEFT's LoRA"
USUAL = ("align_lora", "hydra", "r_lora", "m_lora")
# Every linear layer of the blocks: q, k and v as one operator, gate and up as another, or each layer one of its own.
SIBLINGS, ALONE = ", all layers", ", all layers, share_inputs=False"
_MODELS: dict[str, dict[str, int]] = {
    "random": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "tiny": {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1,
    },
}  # fmt: skip


def frozen_model(name: str, dtype: torch.dtype, device: str) -> Any:
    """Returns a frozen causal language model.

    Args:
        name: "random" (SmolLM2-135M's sizes), "tiny", "smollm2" (that model itself), a folder or a hub id.
        dtype: the dtype of its weights.
        device: "cpu" or "cuda".

    Raises:
        ValueError: there is no such model.
    """
    if name in _MODELS:
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(**_MODELS[name], tie_word_embeddings=True, use_cache=False)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = load_model(None if name == "smollm2" else name, dtype)[0]
        model.config.use_cache = False
    return model.requires_grad_(False).to(device)


def in_4_bits(model: Any) -> Any:
    """Stores the weights of a model's linear layers but its head in nf4 of bitsandbytes, computing in their dtype."""
    from bitsandbytes.nn import Linear4bit

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            parent, _, child = name.rpartition(".")
            weight, size = module.weight, (module.in_features, module.out_features)
            made = Linear4bit(*size, module.bias is not None, weight.dtype, quant_type="nf4").requires_grad_(False)
            made.load_state_dict(module.state_dict())
            setattr(model.get_submodule(parent), child, made.to(weight.device))
    return model


def fetch(name: str) -> None:
    """Downloads a model before several processes load it.

    Raises:
        ValueError: there is no such model.
    """
    if name not in _MODELS:
        load_model(None if name == "smollm2" else name)


def variants(which: str) -> list[str]:
    """Returns variants, the frozen model first: a "few", the "usual" ones, "every" one, or of a "quantised" base."""
    if which == "few":
        return [FROZEN, "r_lora"]
    if which == "quantised":
        return [FROZEN, *(name + FLOAT32 for name in (PEFT, "lora", *USUAL))]
    rivals = [PEFT, "LoRA, restructured", "R-LoRA, loop", "R-LoRA, restructured"]
    siblings = [name + how for name in ("align_lora", "r_lora", "hydra", "m_lora") for how in (SIBLINGS, ALONE)]
    if which == "usual":  # the first ones on a machine that has no time for all
        first = ["align_lora", PEFT, "r_lora", "R-LoRA, restructured"]
        return [FROZEN, *first, *siblings[:4], *(name for name in (*rivals, *USUAL) if name not in first)]
    rivals += ["HydraLoRA, loop", "HydraLoRA, restructured"]
    forms = [f"{name}, compiled" for name in rivals if not name.startswith("PEFT")]
    return [FROZEN, *rivals, *forms, PEFT + FLOAT32, *ARCHITECTURES, "align_lora" + FLOAT32, *siblings]


def adapt(model: nn.Module, variant: str, sizes: Sizes) -> nn.Module:
    """Adds a variant's adapters to gate, up and down projections (mtlora: to blocks) or all layers, in place."""
    if variant == FROZEN:
        return model
    dtype = next(model.parameters()).dtype
    name = variant.removesuffix(FLOAT32).removesuffix(ALONE).removesuffix(SIBLINGS)
    if name in ARCHITECTURES:
        every = variant.endswith((SIBLINGS, ALONE))
        options: dict[str, Any] = {"architecture": name, "target_modules": "all-linear" if every else TARGETS}
        options["share_inputs"] = not variant.endswith(ALONE)
        return replace_linear_with_align_lora(model, config(options, sizes, float32=variant.endswith(FLOAT32)))
    make = (LORA | SEVERAL)[name.removesuffix(", compiled")]
    _replace(model, compiled(make) if name.endswith(", compiled") else make, sizes, dtype, variant.endswith(FLOAT32))
    return model


def _replace(model: nn.Module, make: Make, sizes: Sizes, dtype: torch.dtype, float32: bool) -> None:
    for name, module in list(model.named_modules()):
        parent, _, child = name.rpartition(".")
        if child in TARGETS and isinstance(module, nn.Linear):
            layer = make(module, sizes, torch.float32 if float32 else dtype)
            setattr(model.get_submodule(parent), child, layer.train(module.training))
