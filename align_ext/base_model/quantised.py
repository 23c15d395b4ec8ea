"""Base models with quantised weights: loads them by bitsandbytes, and dequantises those of several libraries."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.linear_layer import features_of


def quantised_loading(load_in_4bit: bool, load_in_8bit: bool, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """Returns the arguments of from_pretrained for a quantised base model; none without either option.

    4 bits are nf4 with double quantisation, as in QLoRA (2305.14314); products are computed in dtype.

    Args:
        load_in_4bit: whether to store the weights in 4 bits.
        load_in_8bit: whether to store them in 8 bits.
        dtype: the dtype of the computation and of what is not quantised.
        device: "cpu" or "cuda": the weights are quantised where they will stay.

    Raises:
        ValueError: bitsandbytes is not installed.
    """
    if not (load_in_4bit or load_in_8bit):
        return {}
    if find_spec("bitsandbytes") is None:
        option = "--load-in-4bit" if load_in_4bit else "--load-in-8bit"
        raise ValueError(f"{option} needs bitsandbytes: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=load_in_4bit,
        bnb_4bit_compute_dtype=dtype,
    )
    return {
        "quantization_config": config,
        "device_map": {"": torch.cuda.current_device() if device == "cuda" else "cpu"},
    }


def keep_differentiable(model: nn.Module) -> None:
    """Keeps 4-bit layers of bitsandbytes in the format whose products have a backward.

    On CPUs with AVX512_BF16 such a layer repacks its weight for good when it first runs in eval mode, and its product
    then has no backward: the gradients of all adapters before it would be wrong.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 (bitsandbytes' own)
        weight: Any = module._parameters.get("weight")  # a property may make one
        if getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
            from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

            weight.data, weight.quant_state = unpack(weight.data, weight.quant_state)


def dequantised(base: nn.Module, dtype: torch.dtype) -> Callable[[], Tensor] | None:
    """A function that makes the weight [out, in] of a quantised layer in a dtype; None where that is not its product.

    It is one where the layer computes x Wᵀ + b of a W that its library makes by name, without rounding x: 4 bits of
    bitsandbytes, and tensors of torchao with quantised weights alone. LLM.int8 and quantised activations round x too.
    """
    weight: Any = base._parameters.get("weight")
    state = getattr(weight, "quant_state", None)
    if state is not None and not getattr(state, "packing_format_for_cpu", False):
        computed = getattr(base, "compute_dtype", None) if getattr(base, "compute_type_is_set", False) else dtype
        if computed not in (None, dtype) or tuple(state.shape) != features_of(base)[::-1]:
            return None
        from bitsandbytes.functional import dequantize_4bit

        return lambda: dequantize_4bit(weight.data.view(-1, 1), state).to(dtype)
    own = getattr(type(weight), "dequantize", Tensor.dequantize) is not Tensor.dequantize
    rounds_x = any(getattr(weight, name, None) is not None for name in ("act_quant_kwargs", "act_pre_scale"))
    if own and not rounds_x and isinstance(weight, Tensor) and type(base) is nn.Linear:
        return lambda: weight.dequantize().to(dtype)
    return None


def is_quantised(model: nn.Module) -> bool:
    """Whether a model's weights are quantised, so that it stays on its device and in its dtype."""
    return getattr(model, "quantization_method", None) is not None
