"""A frozen linear layer with an adapter beside it, and its merging."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters.base import Adapter, at_least_float32
from align_ext.adapters.dora import rescaled, row_norms, scale_of
from align_ext.adapters.linear_layer import features_of, has_float_weight, has_hooks, is_conv1d, is_transposed
from align_ext.ops._projection import Weight


def _casts(x: Tensor) -> bool:
    """Whether autocast would compute a product of x in another dtype."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = x.device.type
    has_autocast = torch.amp.is_autocast_available(kind)
    return has_autocast and torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != x.dtype


class AdaptedModule(nn.Module):
    """A frozen module with an adapter beside it.

    Attributes:
        disabled: whether the module computes as its base alone (model/disable.py).
    """

    disabled = False

    def __init__(self, base_layer: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base_layer, self.adapter = base_layer, adapter

    def unmergeable_reason(self) -> str | None:
        """Why the adapter cannot be merged into the base's weight, or None if it can."""
        raise NotImplementedError

    def base_name(self, name: str) -> str:
        """The name of base_layer's own place in the model, where the adapter has this name."""
        return name

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Accepts a checkpoint of the plain base too: its keys become base_layer's."""
        ours = tuple(f"{prefix}{child}." for child in self._modules)
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(ours)]:
            state_dict[f"{prefix}base_layer.{key.removeprefix(prefix)}"] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class AdaptedWeight(AdaptedModule):
    """An adapter beside one frozen weight, into which it may be merged.

    Attributes:
        merged: whether the weight holds the adapter now.
    """

    merged = False

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        raise NotImplementedError

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored [..., in, out]."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """The adapter as a change of the base weight, [out_features, in_features], float32."""
        return self.adapter.delta_weight()

    def _changed(self, weight: Tensor, delta: Tensor) -> Tensor:
        """W [..., out, in] + delta in delta's dtype."""
        return weight.to(delta.dtype) + delta

    def unmergeable_reason(self) -> str | None:
        """Why the adapter cannot be merged into the base weight, or None if it can."""
        return self.adapter.unmergeable_reason() or self.base_unmergeable_reason()

    def base_unmergeable_reason(self) -> str | None:
        """Why nothing can be merged into the base weight, or None."""
        weight: Any = getattr(self, "weight", None)
        if hasattr(weight, "device_mesh") or hasattr(weight, "ds_id"):
            return "several processes hold parts of the base weight: save the adapter, and merge it in one process"
        if reason := self._weight_problem():
            return reason
        if has_hooks(self.base_layer):
            return "the base layer has hooks, which may change its output"
        if weight.is_meta:
            return "the base weight is on the meta device or offloaded: load it first"
        return self._forward_problem()

    def _forward_problem(self) -> str | None:
        """Why the base's forward is not the product of a weight that is there, or None."""
        return None

    def _weight_problem(self) -> str | None:
        """Why the base's change is not that of its weight, or None."""
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
            changes = self._changes(delta)
            self._before_merging = [(tensor, tensor.detach().clone()) for tensor, _ in changes]
            _apply(changes)
            self.merged = True

    def unmerge(self) -> None:
        """Takes the adapter off the base weight again, to the bit: merge kept the weight as it was."""
        if self.merged:
            _apply(self._before_merging)
            del self._before_merging
            self.merged = False

    @torch.no_grad()
    def merged_base(self, delta: Tensor | None = None) -> nn.Module:
        """The base layer with W + delta in its weight; the adapter is left without its place."""
        if not self.merged:
            _apply(self._changes(delta))
        return self.base_layer

    @torch.no_grad()
    def _changes(self, delta: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """The tensors of the base that merging changes, each with its new value."""
        return [(self.weight, self.merged_weight(delta))]

    @torch.no_grad()
    def merged_weight(self, delta: Tensor | None = None) -> Tensor:
        """Computes W + delta (the adapter's, or a given one) in float32 or wider and rounds it once; W is not touched.

        DoRA's norms are those of W + delta: g (W + delta).

        Raises:
            ValueError: the result is not finite; the message says why.
        """
        delta = self.adapter.delta_weight() if delta is None else delta
        weight, delta = self.weight, delta.to(self.weight.device)
        result = self._changed(weight.mT if self.is_transposed else weight, delta).to(weight.dtype)
        result = result.mT if self.is_transposed else result
        if not torch.isfinite(result).all():
            if not torch.isfinite(delta).all():
                reason = "its adapter's change of the weight is not finite: load an earlier checkpoint of the adapter"
            elif not torch.isfinite(weight).all():
                reason = "the base weight holds values that are not finite: load the base model again"
            else:
                reason = f"the merged weight is too large for {weight.dtype}: load the base in bfloat16 or float32"
            raise ValueError(reason)
        return result


@torch.no_grad()
def _apply(changes: list[tuple[Tensor, Tensor]]) -> None:
    for tensor, value in changes:
        tensor.copy_(value)


class AdaptedLinear(AdaptedWeight):
    """A frozen linear-like layer with an adapter beside it.

    The base layer keeps its own forward: it is called as it is (base_out), or, when it is a plain frozen nn.Linear,
    its weight is handed to the op, which then composes it with the low-rank part (weight). In training a quantised
    weight is handed over as a function that dequantises it, once in each direction; in evaluation, where a row may be
    one token, the layer's own product is taken.

    Attributes:
        siblings: the layers that get the same tensor, of which the first one computes all in training
            (adapters/siblings.py); None: there are none.
        tied_to: the name of another module that holds the base layer's weight too; None: there is none.
        dequantised: returns the function that makes a layer's weight in a dtype, or None where there is none; of a base
            model it is base_model/quantised.py's.
    """

    siblings: Any = None
    tied_to: str | None = None
    dequantised: Callable[[nn.Module, torch.dtype], Callable[[], Tensor] | None] | None = None

    def __init__(self, base_layer: nn.Module, adapter: Adapter) -> None:
        super().__init__(base_layer, adapter)
        self.in_features, self.out_features = features_of(base_layer)

    @property
    def weight(self) -> Tensor:
        """The base layer's weight; some models look at it from outside."""
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored [in, out], as Conv1D's and an embedding's are."""
        return is_transposed(self.base_layer)

    @property
    def _lora_bias(self) -> Tensor | None:
        return getattr(self.adapter, "lora_bias", None)  # merging/arithmetic.py merges a change without an adapter

    @property
    def bias(self) -> Tensor | None:
        """The base layer's bias."""
        return getattr(self.base_layer, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """Computes base(x) + low rank for x [..., in_features]; base(x) alone while merged or disabled."""
        if self.merged or self.disabled:
            return self.base_layer(x)
        adapter = self.adapter
        magnitude = adapter.lora_magnitude_vector
        if magnitude is None:
            return self._with_low_rank(x)
        scale = scale_of(magnitude, self.row_norms())
        if not (self.training and adapter.drops_whole_input and adapter.dropout_p):
            y = self._with_low_rank(x)
            return rescaled(y, scale, self.bias).to(y.dtype)
        dropped = nn.functional.dropout(x, adapter.dropout_p)
        base_out = self._base_out(dropped)
        y = adapter(dropped.to(base_out.dtype), base_out=base_out)
        return (self._base_out(x) + (rescaled(y, scale, self.bias) - base_out)).to(y.dtype)

    def _with_low_rank(self, x: Tensor) -> Tensor:
        """Computes base(x) + low rank, with the layer's siblings where it has some."""
        if not torch.compiler.is_compiling() and self.training and self.siblings is not None:
            outputs = self.siblings.outputs(self, x)
            if outputs is not None:
                return self.adapter.hand_over(self.adapter.step(), x, *outputs)
        return self.adapter(*self.base_arguments(x))

    def weight_arguments(self, x: Tensor) -> tuple[Weight, Tensor | None] | None:
        """Weight and bias of a frozen base layer that is its product with x and nothing more; None of another one."""
        base: Any = self.base_layer
        weight, bias = base._parameters.get("weight"), base._parameters.get("bias")  # None where they are computed
        frozen = (
            weight is not None
            and weight.device == x.device
            and not weight.requires_grad
            and (bias is None or not bias.requires_grad)
            and not _casts(x)
            and "forward" not in base.__dict__  # accelerate's hooks replace it
            and not has_hooks(base)
        )
        if frozen and type(base) is nn.Linear and type(weight) is nn.Parameter and weight.dtype == x.dtype:
            return weight, bias
        if frozen and self.training and self.dequantised is not None and not torch.compiler.is_compiling():
            made = self.dequantised(base, x.dtype)
            if made is not None:
                return made, None if bias is None else bias.to(x.dtype)
        return None

    def base_arguments(self, x: Tensor) -> tuple[Tensor, Weight, Tensor | None, Tensor | None]:
        """The base layer in the form that the ops take.

        Returns:
            x in the dtype of the product, then weight, bias and base_out: one of weight and base_out is None.
        """
        frozen = self.weight_arguments(x)
        if frozen is not None:
            return x, *frozen, None
        base_out = self._base_out(x)
        return x.to(base_out.dtype), None, None, base_out

    def _base_out(self, x: Tensor) -> Tensor:
        """What the base layer returns for x, which must keep the gradient of x."""
        base = self.base_layer
        base_out: Tensor = base(x)
        if torch.is_grad_enabled() and x.requires_grad and not base_out.requires_grad:
            raise RuntimeError(
                f"the base layer ({type(base).__name__}) loses the gradient of its input, computing without autograd, "
                "so that no adapter before it could be trained; load the base in another format"
            )
        return base_out

    def base_weight(self) -> Tensor:
        """The base's weight W [out_features, in_features] in a floating-point dtype, dequantised where it is quantised.

        Raises:
            ValueError: there is none to be had; the message says why.
        """
        base: Any = self.base_layer
        weight: Any = getattr(base, "weight", None)
        if hasattr(weight, "ds_id"):
            raise ValueError("use_dora: several processes hold parts of the base weight (ZeRO-3): train with ZeRO-2 or "
                             "FSDP2, or without DoRA")  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16, torch.float16):  # that of the layer's product, if it has one
            made = None if weight is None or self.dequantised is None else self.dequantised(base, dtype)
            if made is not None:
                return made()
        shape = (self.in_features, self.out_features)[:: 1 if self.is_transposed else -1]
        if weight is None or not weight.is_floating_point() or weight.element_size() < 2 or weight.shape != shape:
            raise ValueError(f"use_dora: {type(base).__name__} does not tell the values of its quantised weight: load "
                             "the base in 4 bits of bitsandbytes or in a floating-point dtype")  # fmt: skip
        if weight.is_meta and not self.adapter.lora_A.is_meta:
            raise ValueError("use_dora: the base weight is offloaded: load the base on one device")
        return weight.T if self.is_transposed else weight

    @torch.no_grad()
    def row_norms(self) -> Tensor:
        """The norms of the rows of the base weight with the adapter's change of it, [out_features], for DoRA."""
        return row_norms(self.base_weight().detach(), self.adapter.delta_factors(), self.adapter.scaling)

    @override
    def delta_weight(self) -> Tensor:
        """The adapter as a change of the base weight, [out_features, in_features], float32."""
        delta = self.adapter.delta_weight()
        if self.adapter.lora_magnitude_vector is None:
            return delta
        weight = self.base_weight()
        return self._changed(weight, delta) - weight

    @override
    def _changed(self, weight: Tensor, delta: Tensor) -> Tensor:
        """W [out, in] + delta in delta's dtype, with the norms of DoRA where the adapter trains them."""
        changed = super()._changed(weight, delta)
        magnitude = getattr(self.adapter, "lora_magnitude_vector", None)
        if magnitude is None:
            return changed
        return changed * scale_of(magnitude, torch.linalg.vector_norm(changed, dim=1))[:, None]

    @override
    def _weight_problem(self) -> str | None:
        base: Any = self.base_layer
        if self._lora_bias is not None and self.bias is None:
            return "its adapter has a bias (lora_bias), and the base layer has none to add it to: keep it as an adapter"
        if self.tied_to is not None:
            return (
                f"its weight is that of {self.tied_to} too, which merging would change: load the adapter into a base "
                "whose head has a copy of its own (tie_word_embeddings=False), and merge it there"
            )
        if not has_float_weight(base):
            return "the base weight is quantised: load the base in a floating-point dtype to merge"
        if not isinstance(base._parameters.get("weight"), nn.Parameter):
            return "the base weight is computed from others (parametrised, pruned)"
        return None

    @override
    def _forward_problem(self) -> str | None:
        if self.has_own_forward():
            return (
                f"{type(self.base_layer).__name__} has a forward of its own, which is not its weight's product with x"
            )
        return None

    def has_own_forward(self) -> bool:
        """Whether the base layer computes something else than the product with its weight."""
        base = self.base_layer
        return not is_conv1d(base) and type(base).forward is not nn.Linear.forward and not _multiplies(base)

    @override
    def _changes(self, delta: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """The weight, and with lora_bias the bias + s b, added in float32 or wider and rounded once."""
        bias, added, changes = self.bias, self._lora_bias, super()._changes(delta)
        if bias is None or added is None:
            return changes
        value = bias + self.adapter.scaling * at_least_float32(added).to(bias.device)
        return [*changes, (bias, value.to(bias.dtype))]


@torch.no_grad()
def _multiplies(base: Any) -> bool:
    """Whether a layer's own forward computes W x + b, as Falcon's does, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, base.in_features, generator=generator).to(base.weight)
    expected = nn.functional.linear(x, base.weight, base.bias)
    return bool((base(x) - expected).norm() <= 8 * torch.finfo(x.dtype).eps * expected.norm())
