"""A LoRA for each expert of a mixture whose experts are one tensor, in the form of transformers' experts interface.

A token t goes through k experts e with weights w_te, which the router chooses. Its T k rows are sorted by their
experts, so that each expert's are a range of them, and every product of an adapted tensor is, with one call each of
expert_product and grouped_lora,

    y = x W_eᵀ (+ b_e) + s B_e A_e dropout(x)        for a row of expert e

The rest is the experts' own: how gate and up are combined, a norm behind, and the sum of the experts' outputs by their
weights. The module tells by its attributes how its tensors are stored (num_experts, has_gate, has_bias, is_transposed,
has_post_expert_norm), whatever family of models it is of.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.adapted_linear import AdaptedModule, AdaptedWeight
from align_ext.adapters.base import Adapter, Factors, LowRankOutput
from align_ext.adapters.expert_product import expert_product
from align_ext.alignment.model_state import AlignState
from align_ext.alignment.step import AlignStep
from align_ext.alignment.tokens import ROUTED
from align_ext.config import AlignLoraConfig
from align_ext.ops import group_rows, grouped_lora

EXPERT_TENSORS = ("gate_up_proj", "up_proj", "down_proj")  # in the order in which modules have them


class ExpertsLora(Adapter):
    """One LoRA for each of E experts; e is the expert of a row.

        z = A_e dropout(x)              [T k, r]
        y = base(x) + s B_e z           [T k, m]

    lora_A is [E, r, n], lora_B [E, m, r]. What is aligned is z of all rows, each with the task of its token.
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int, experts: int) -> None:
        super().__init__(config, in_features, out_features)
        self.init = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(experts, self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(experts, out_features, self.r))

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        init.each(self.init, self.lora_A.data, self.lora_B.data)

    @override
    def join(self, state: AlignState, name: str) -> None:
        super().join(state, name)
        if self.layer is not None:
            state.sources[self.layer] = ROUTED

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        places = op.pop("places")
        y, z = grouped_lora(x, self.lora_A, self.lora_B, self.scaling, dropout_p=dropout_p, **op)
        return y, z[places], None  # z by token, as the tasks are

    @override
    def delta_factors(self) -> list[Factors]:
        """(A, B), [E, r, n] and [E, m, r]."""
        return [(self.lora_A, self.lora_B)]


@dataclass(frozen=True)
class Rows:
    """The rows of T tokens in the order of their experts.

    Attributes:
        order: int64 [T k]: the number t k + i of each row, of token t and its i-th expert.
        places: int64 [T k], its inverse: the place of row t k + i.
        experts: int64 [T k], the expert of each row in order.
        offsets: int64 [E + 1]: expert e owns the rows offsets[e] .. offsets[e+1] in order.
        top_k: k.
    """

    order: Tensor
    places: Tensor
    experts: Tensor
    offsets: Tensor
    top_k: int

    @classmethod
    def of(cls, chosen: Tensor, experts: int) -> "Rows":
        """Sorts the rows; chosen: int64 [T, k], the experts of each token, of `experts`."""
        ids = chosen.reshape(-1)
        sorted_rows = group_rows(ids, experts)
        order, offsets = sorted_rows[: len(ids)], sorted_rows[len(ids) :]
        places = torch.empty_like(order).scatter_(0, order, torch.arange(len(ids), device=order.device))
        return cls(order, places, ids[order], offsets, chosen.shape[-1])


class AdaptedParameter(AdaptedWeight):
    """The frozen tensor of one product of all experts, with the adapter beside it.

    The tensor stays the experts module's own parameter, beside which this is a child of AdaptedExperts.
    """

    def __init__(self, experts: nn.Module, parameter: str, adapter: Adapter) -> None:
        nn.Module.__init__(self)
        self._experts = (experts,)  # not a child of this module
        self.parameter, self.adapter = parameter, adapter
        self.out_features, self.in_features = adapter.out_features, adapter.in_features

    @property
    def base_layer(self) -> nn.Module:  # type: ignore[override]
        """The experts."""
        return self._experts[0]

    @property
    @override
    def weight(self) -> Tensor:
        """The tensor, [E, out, in], or [E, in, out] where is_transposed."""
        return getattr(self.base_layer, self.parameter)

    @property
    @override
    def is_transposed(self) -> bool:
        return bool(self.base_layer.is_transposed)

    @override
    def base_name(self, name: str) -> str:
        return name.rpartition(".")[0]

    @override
    def _weight_problem(self) -> str | None:
        own = self.base_layer._parameters.get(self.parameter)
        return None if isinstance(own, nn.Parameter) else "the base weight is computed from others (parametrised)"

    def forward(self, x: Tensor, base_out: Tensor, rows: Rows) -> Tensor:
        """Adds the low rank to the product base_out of the rows x; nothing while merged or disabled."""
        if self.merged or self.disabled:
            return base_out
        return self.adapter(x, base_out=base_out, offsets=rows.offsets, places=rows.places)


class AdaptedExperts(AdaptedModule):
    """Frozen experts with an AdaptedParameter, by its name, for each adapted tensor."""

    def __init__(self, experts: nn.Module) -> None:
        nn.Module.__init__(self)
        self.base_layer, self.training = experts, experts.training

    @property
    def adapter(self) -> nn.ModuleList:  # type: ignore[override]
        """The adapters of all tensors."""
        return nn.ModuleList(layer.adapter for layer in self._layers())

    def _layers(self) -> list[AdaptedParameter]:
        return [layer for layer in self._modules.values() if isinstance(layer, AdaptedParameter)]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Computes Σ_e w_te expert_e(x_t) for each token t, each product with its adapter.

        Args:
            hidden_states: x, [T, n].
            top_k_index: int64 [T, k], the experts of each token; number E stands for none.
            top_k_weights: w, [T, k].
        """
        base: Any = self.base_layer
        if all(layer.merged or layer.disabled for layer in self._layers()):
            return base(hidden_states, top_k_index, top_k_weights)
        rows = Rows.of(top_k_index.clamp(max=base.num_experts - 1), base.num_experts)
        weights = torch.where(top_k_index < base.num_experts, top_k_weights, 0).reshape(-1)[rows.order]
        y = self._product(up_name(base), hidden_states[rows.order // rows.top_k], rows)
        y = base._apply_gate(y) if base.has_gate else base.act_fn(y)
        y = self._product("down_proj", y, rows)
        y = base.post_expert_norm(y) if base.has_post_expert_norm else y
        y = (y * weights[:, None])[rows.places].unflatten(0, (-1, rows.top_k)).sum(1)
        return y.to(hidden_states.dtype)

    def _product(self, name: str, x: Tensor, rows: Rows) -> Tensor:
        base: Any = self.base_layer
        weight: Tensor = getattr(base, name)
        if weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} of the adapted experts requires a gradient, which is not computed beside their adapters: "
                "call requires_grad_(False) on it, or leave target_parameters out"
            )
        x = x.to(weight.dtype)
        out = expert_product(x, weight if base.is_transposed else weight.mT, rows.offsets)
        if base.has_bias:
            out = out + getattr(base, f"{name}_bias")[rows.experts]
        layer = self._modules.get(name)
        return out if layer is None else layer(x, out, rows)

    def __getattr__(self, name: str) -> Any:
        """Looks further attributes up in the experts, since models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def up_name(experts: Any) -> str:
    """The name of the tensor of the first product."""
    return "gate_up_proj" if experts.has_gate else "up_proj"


def insert_parameter(model: nn.Module, name: str, layer: AdaptedParameter) -> None:
    """Puts an AdaptedParameter beside the parameter of this name, in an AdaptedExperts in the place of the experts."""
    path, _, child = name.rpartition(".")
    experts = model.get_submodule(path)
    if not isinstance(experts, AdaptedExperts):
        experts = AdaptedExperts(experts)
        parent, _, place = path.rpartition(".")
        setattr(model.get_submodule(parent), place, experts)
    setattr(experts, child, layer)
