"""The base classes of all architectures: an adapter, and the linear layer with an adapter beside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align_ext.alignment.model_state import AlignState
from align_ext.alignment.step import AlignStep
from align_ext.alignment.tap import as_key
from align_ext.config import AlignLoraConfig

LowRankOutput = tuple[Tensor, Tensor, Tensor | None]  # y, z, w
Factors = tuple[Tensor, Tensor]  # A, B


class Captured(NamedTuple):
    """The latents and routing weights of one call of an adapter, without a graph.

    Attributes:
        z: latents [T, r], or [T, N, r] where heads have latents of their own; T the tokens of the layer's input.
        w: a router's weights [T, G, N]; None without one.
    """

    z: Tensor
    w: Tensor | None


class Adapter(nn.Module):
    """The low-rank path of one layer: parameters, and one call of an op.

    A subclass makes its parameters (lora_A, lora_B and others, all starting with lora_) and overrides
    `reset_lora_parameters` (their first values), `low_rank_forward` (what it computes), and `delta_factors` (the change
    of the weight that this is) or `unmergeable_reason` (why it is none).

    Attributes:
        capture: a function that gets the latents of each forward (align_ext/adapters/capture.py), or None.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    capture: Callable[[Captured], None] | None = None

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r, self.scaling, self.dropout_p = config.r, config.scaling, config.lora_dropout
        self.state: AlignState | None = None
        self.layer: int | None = None  # its number among those whose outputs a step records
        self.layer_key: Tensor | None = None  # the same for compiled graphs

    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        """Gives the parameters their first values; weight: the base's [out, in], where the initialisation needs it."""
        raise NotImplementedError

    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        """Computes y, z and, with a router, its weights w; op holds the base."""
        raise NotImplementedError

    def join(self, state: AlignState, name: str) -> None:
        """Takes part in the model's steps under this name."""
        self.state = state
        if state.config.align or state.config.balance:
            self.layer = state.add_layer(name, self.r)
            self.layer_key = as_key(self.layer)

    def forward(
        self, x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, base_out: Tensor | None = None
    ) -> Tensor:
        """Computes base(x) + low rank for x [..., in_features]; the base is weight and bias, or what it returned."""
        dropout_p = self.dropout_p if self.training else 0.0
        step = self.state.find(self.training) if self.state is not None else None
        y, z, w = self.low_rank_forward(x, dropout_p, step, weight=weight, bias=bias, base_out=base_out)
        if self.capture is not None:
            self.capture(Captured(z.detach(), None if w is None else w.detach()))
        if step is None or self.layer_key is None or not (self.training and step.records):
            return y
        return step.tap(self, x, y, z, w)

    def delta_factors(self) -> list[Factors]:
        """Pairs A [r, n] and B [m, r] of which s Σ B A is the adapter's change of the base weight.

        Raises:
            TypeError: it is none; unmergeable_reason says why.
        """
        raise TypeError(f"{type(self).__name__} is no fixed change of the weight: {self.unmergeable_reason()}")

    def uniform_delta_factors(self) -> list[Factors]:
        """The factors if the router gave all heads the same weight: an approximation."""
        return self.delta_factors()

    def delta_weight(self) -> Tensor:
        """The adapter as a change of the base weight, [out_features, in_features], float32 (float64 for float64).

        Raises:
            TypeError: it is none; unmergeable_reason says why.
        """
        return self._product(self.delta_factors())

    def uniform_delta_weight(self) -> Tensor:
        """The change of the weight if the router gave all heads the same weight: an approximation."""
        return self._product(self.uniform_delta_factors())

    def _product(self, delta_factors: list[Factors]) -> Tensor:
        """S Σ B A; term by term, so that an offset takes the start off to the bit."""
        first, *others = (at_least_float32(B) @ at_least_float32(A) for A, B in delta_factors)
        return self.scaling * sum(others, first)

    def unmergeable_reason(self) -> str | None:
        """Why the adapter is no change of the weight, or None if it is."""
        return None

    def extra_repr(self) -> str:
        """The adapter's options."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout_p={self.dropout_p:g}"


def at_least_float32(tensor: Tensor) -> Tensor:
    """A tensor in float32, or in float64 if it is that already."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def offset_factors(A0: Tensor | None, B0: Tensor | None) -> list[Factors]:
    """(A0, -B0), which takes the adapter of the start off again; nothing where it started as no change."""
    return [] if A0 is None or B0 is None else [(A0, -B0)]


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


def has_hooks(module: nn.Module) -> bool:
    """Whether something runs before or after a module."""
    of_forward, of_backward = module._forward_hooks or module._forward_pre_hooks, module._backward_hooks
    return bool(of_forward or of_backward or module._backward_pre_hooks)


class AdaptedModule(nn.Module):
    """A frozen module with an adapter beside it."""

    def __init__(self, base_layer: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def unmergeable_reason(self) -> str | None:
        """Why the adapter cannot be merged into the base's weight, or None if it can."""
        raise NotImplementedError

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accepts a checkpoint of the plain base too: its keys become base_layer's."""
        ours = (f"{prefix}base_layer.", f"{prefix}adapter.")
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(ours)]:
            state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaptedLinear(AdaptedModule):
    """A frozen linear-like layer with an adapter beside it.

    The base layer keeps its own forward: it is called as it is (base_out), or, when it is a plain frozen nn.Linear,
    its weight is handed to the op, which then composes it with the low-rank part (weight).
    """

    def __init__(self, base_layer: nn.Module, adapter: Adapter) -> None:
        super().__init__(base_layer, adapter)
        self.in_features, self.out_features = features_of(base_layer)
        self.merged = False

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; some models look at it from outside."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Computes base(x) + low rank for x [..., in_features]; base(x) alone while merged."""
        if self.merged:
            return self.base_layer(x)
        return self.adapter(*self.base_arguments(x))

    def base_arguments(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """The base layer in the form that the ops take.

        Returns:
            x in the dtype of the product, then weight, bias and base_out: one of weight and base_out is None.
        """
        base: Any = self.base_layer
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # None where they are computed
        plain = (
            type(base) is nn.Linear
            and type(weight) is nn.Parameter
            and weight.dtype == x.dtype
            and weight.device == x.device
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not torch.is_autocast_enabled(x.device.type)
            and "forward" not in base.__dict__  # accelerate's hooks replace it
            and not has_hooks(base)
        )
        if plain:
            return x, weight, bias, None
        base_out = base(x)
        return x.to(base_out.dtype), None, None, base_out

    def delta_weight(self) -> Tensor:
        """The adapter as a change of the base weight, [out_features, in_features], float32."""
        return self.adapter.delta_weight()

    def unmergeable_reason(self) -> str | None:
        """Why the adapter cannot be merged into the base weight, or None if it can."""
        return self.adapter.unmergeable_reason() or self.base_unmergeable_reason()

    def base_unmergeable_reason(self) -> str | None:
        """Why nothing can be merged into the base weight, or None."""
        base: Any = self.base_layer
        weight: Any = getattr(base, "weight", None)
        if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
            return "several processes hold parts of the base weight: save the adapter, and merge it in one process"
        if not has_float_weight(base):
            return "the base weight is quantised: load the base in a floating-point dtype to merge"
        if not isinstance(base._parameters.get("weight"), nn.Parameter):
            return "the base weight is computed from others (parametrised, pruned)"
        if not is_conv1d(base) and type(base).forward is not nn.Linear.forward:
            return f"{type(base).__name__} has a forward of its own"
        if has_hooks(base):
            return "the base layer has hooks, which may change its output"
        if self.weight.is_meta:
            return "the base weight is on the meta device or offloaded: load it first"
        return None

    def merge(self, delta: Tensor | None = None) -> None:
        """Adds the adapter (or a given delta) to the base weight, in float32 (float64 for float64); once.

        Raises:
            ValueError: it cannot be merged; the message says why.
        """
        reason = self.base_unmergeable_reason() if delta is not None else self.unmergeable_reason()
        if reason is not None:
            raise ValueError(f"the layer cannot be merged: {reason}")
        if not self.merged:
            merged = self.merged_weight(delta)
            self._before_merging = self.weight.detach().clone()
            with torch.no_grad():
                self.weight.copy_(merged)
            self.merged = True

    def unmerge(self) -> None:
        """Takes the adapter off the base weight again, to the bit: merge kept the weight as it was."""
        if self.merged:
            with torch.no_grad():
                self.weight.copy_(self._before_merging)
            del self._before_merging
            self.merged = False

    @torch.no_grad()
    def merged_base(self, delta: Tensor | None = None) -> nn.Module:
        """The base layer with W + delta in its weight; the adapter is left without its place."""
        if not self.merged:
            self.weight.copy_(self.merged_weight(delta))
        return self.base_layer

    @torch.no_grad()
    def merged_weight(self, delta: Tensor | None = None) -> Tensor:
        """Computes W + delta (the adapter's, or a given one) in float32 or wider and rounds it once; W is not touched.

        Raises:
            ValueError: the result is not finite; the message says why.
        """
        delta = self.delta_weight() if delta is None else delta
        weight, delta = self.weight, delta.to(self.weight.device)
        delta = delta.T if is_conv1d(self.base_layer) else delta
        result = (weight.to(delta.dtype) + delta).to(weight.dtype)
        if not torch.isfinite(result).all():
            if not torch.isfinite(delta).all():
                reason = "its adapter's change of the weight is not finite: load an earlier checkpoint of the adapter"
            elif not torch.isfinite(weight).all():
                reason = "the base weight holds values that are not finite: load the base model again"
            else:
                reason = f"the merged weight is too large for {weight.dtype}: load the base in bfloat16 or float32"
            raise ValueError(reason)
        return result
