"""Properties of a linear layer, quantised or not."""

from typing import Any

import torch
from torch import Tensor, nn


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (GPT-2), a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_transposed(module: nn.Module) -> bool:
    """Whether a module's weight is stored (in, out): Conv1D's, and that of an embedding, whose inputs are tokens."""
    return is_conv1d(module) or isinstance(module, nn.Embedding)


def features_of(base: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear-like layer, quantised or not."""
    if is_transposed(base):
        in_features, out_features = getattr(base.weight, "ds_shape", base.weight.shape)  # type: ignore[misc]
        return int(in_features), int(out_features)
    return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]


def has_float_weight(base: nn.Module) -> bool:
    """Whether the layer's weight is an ordinary floating-point tensor: not quantised, not a tensor subclass."""
    weight: Any = getattr(base, "weight", None)
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.element_size() >= 2


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after a module."""
    of_forward, of_backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(of_forward or of_backward or module._backward_pre_hooks)


def device_of(module: nn.Module) -> torch.device:
    """Returns the device that a layer or block computes on."""
    tensors: list[Any] = [*module.parameters(), *module.buffers()]  # packed weights may be buffers
    device = tensors[0].device if tensors else torch.device("cpu")
    hook = getattr(module, "_hf_hook", None)  # offloaded weights are on meta, but are computed on another device
    return torch.device(getattr(hook, "execution_device", None) or device)
