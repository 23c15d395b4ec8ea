"""What every adapted linear layer shares: the frozen base layer, how the op gets it, merging, state dicts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is transformers' Conv1D (GPT-2), a linear layer whose weight is stored (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def features_of(base: nn.Module) -> tuple[int, int]:
    """(in_features, out_features) of a linear-like layer, quantised or not."""
    if is_conv1d(base):
        in_features, out_features = base.weight.shape  # type: ignore[misc]
        return int(in_features), int(out_features)
    return int(base.in_features), int(base.out_features)  # type: ignore[arg-type]


def has_float_weight(base: nn.Module) -> bool:
    """Whether the layer's weight is an ordinary floating-point tensor: not quantised, not a tensor subclass."""
    weight: Any = getattr(base, "weight", None)
    return type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() and weight.element_size() >= 2


class AdaptedLinear(nn.Module):
    """A frozen linear-like layer with an adapter beside it.

    The base layer keeps its own forward: it is called as it is (base_out), or, when it is a plain frozen nn.Linear,
    its weight is handed to the op, which then composes it with the low-rank part (weight).
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = features_of(base_layer)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; some models look at it from outside."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def base_arguments(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """The base layer in the form that the ops take.

        Returns:
            x in the dtype of the product, and either weight and bias or base_out.
        """
        base, weight = self.base_layer, getattr(self.base_layer, "weight", None)
        plain = (
            type(base) is nn.Linear
            and type(weight) is nn.Parameter
            and weight.dtype == x.dtype
            and weight.device == x.device
            and not weight.requires_grad
            and (base.bias is None or not base.bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
            and "forward" not in base.__dict__  # accelerate's hooks replace it
            and not any(getattr(base, hooks) for hooks in _HOOKS)
        )
        if plain:
            return x, {"weight": weight, "bias": base.bias}  # type: ignore[dict-item]
        base_out = base(x)
        return x.to(base_out.dtype), {"base_out": base_out}

    def delta_weight(self) -> Tensor:
        """The adapter as a change of the base weight, [out_features, in_features], float32."""
        raise TypeError(f"{type(self).__name__} is no fixed change of the weight")

    def cannot_merge(self) -> str | None:
        """Why the adapter cannot be merged into the base weight, or None if it can."""
        base: Any = self.base_layer
        if not has_float_weight(base):
            return "the base weight is quantised: load the base in a floating-point dtype to merge"
        if not isinstance(base._parameters.get("weight"), nn.Parameter):
            return "the base weight is computed from others (parametrised, pruned)"
        if not is_conv1d(base) and type(base).forward is not nn.Linear.forward:
            return f"{type(base).__name__} has a forward of its own"
        if any(getattr(base, hooks) for hooks in _HOOKS):
            return "the base layer has hooks, which may change its output"
        if self.weight.is_meta:
            return "the base weight is on the meta device or offloaded: load it first"
        return None

    @torch.no_grad()
    def merged_base(self) -> nn.Module:
        """The base layer with W + delta in its weight, computed in float32 (float64 for float64)."""
        weight = self.weight
        delta = self.delta_weight().to(weight.device)
        delta = delta.T if is_conv1d(self.base_layer) else delta
        weight.copy_(weight.to(delta.dtype) + delta)
        return self.base_layer

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accepts a checkpoint of the plain base layer too: its keys become base_layer's."""
        own = (*self.base_layer._parameters, *self.base_layer._buffers)
        for name in own:
            plain, ours = f"{prefix}{name}", f"{prefix}base_layer.{name}"
            if plain in state_dict and ours not in state_dict:
                state_dict[ours] = state_dict.pop(plain)
        super()._load_from_state_dict(state_dict, prefix, *args)
