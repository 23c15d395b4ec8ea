"""Properties of a linear layer, quantised or not."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (GPT-2), a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def features_of(base: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear-like layer, quantised or not."""
    if is_conv1d(base):
        in_features, out_features = getattr(base.weight, "ds_shape", base.weight.shape)  # type: ignore[misc]
        return int(in_features), int(out_features)
    return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]


def has_float_weight(base: nn.Module) -> bool:
    """Whether the layer's weight is an ordinary floating-point tensor: not quantised, not a tensor subclass."""
    weight: Any = getattr(base, "weight", None)
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.element_size() >= 2


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


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after a module."""
    of_forward, of_backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(of_forward or of_backward or module._backward_pre_hooks)
