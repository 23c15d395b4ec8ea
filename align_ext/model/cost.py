"""What adapters cost: trained parameters, the rank that a budget of them buys, and floating-point operations."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from align_ext.adapters import adapter_class
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.base import Adapter, features_of
from align_ext.alignment.guards import check_model
from align_ext.alignment.model_state import find_state
from align_ext.base_model.select_layers import is_linear
from align_ext.config import AlignLoraConfig
from align_ext.model.replace import sizes_to_adapt


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has.

    Attributes:
        trainable: those that require a gradient, of the routers too.
        total: all, each shared one once; a quantised weight counts the elements that it is stored in.
        router: those of the adapters' routers.
    """

    trainable: int
    total: int
    router: int

    @property
    def percent(self) -> float:
        """The trainable share in percent."""
        return 100 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        routers = f", {self.router:,} of them in routers" if self.router else ""
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3g}%){routers}"


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of a forward for one token, a multiplication and an addition being two.

    Attributes:
        base: of the model's linear layers, 2 n m each; not of attention between tokens, which grows with their number,
            nor of experts that are no linear layers.
        adapters: of the adapters' products, in training.
    """

    base: int
    adapters: int

    def __str__(self) -> str:
        share = 100 * self.adapters / max(self.base, 1)
        return f"{self.base:,} FLOPs a token in the base, {self.adapters:,} in the adapters ({share:.3g}%)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts a model's parameters: trainable, all, and those of routers. Any model, with adapters or without."""
    check_model(model)
    named = list(model.named_parameters())
    return ParameterCount(
        trainable=sum(p.numel() for _, p in named if p.requires_grad),
        total=sum(p.numel() for _, p in named),
        router=sum(p.numel() for name, p in named if ".lora_router." in name),
    )


def match_rank(config: AlignLoraConfig, model: nn.Module, budget: int | AlignLoraConfig) -> int:
    """Finds the largest rank whose trained parameters do not exceed a budget: LoRA-dagger of 2508.05078.

    Comparisons of architectures are fair at equal parameters: a LoRA matched to HydraLoRA has a larger rank. Nothing
    is built on the way, so the model may be on the meta device. With the result r: dataclasses.replace(config, r=r).

    Args:
        config: the architecture to size; its r is not looked at.
        model: a plain model; the layers that config would adapt are counted.
        budget: trained parameters, or a config that says them on the same model.

    Returns:
        The rank, at most the smallest width of a layer (no product B A has a larger one); even for orthogonal heads.

    Raises:
        ValueError: the budget does not reach for the smallest rank, the model has adapters already, or nothing matches.
    """
    if find_state(model) is not None:
        raise ValueError("the model has adapters already: give the plain model, or unload(model) first")
    allowed = _trained(budget, model) if isinstance(budget, AlignLoraConfig) else budget
    step = 2 if config.init_lora_weights == "orthogonal" else 1
    # All architectures are linear in r: so many parameters for each r, and a router's.
    least, next_one = (_trained(replace(config, r=r), model) for r in (step, 2 * step))
    if allowed < least:
        raise ValueError(
            f"budget={allowed:,} is below {least:,}, what {config.architecture!r} trains at r={step}: give it more, "
            "fewer heads, or fewer layers"
        )
    widest = min(min(sizes) for sizes in sizes_to_adapt(model, config))
    return min(step * (1 + (allowed - least) // (next_one - least)), widest - widest % step)


def _trained(config: AlignLoraConfig, model: nn.Module) -> int:
    """The parameters that a config would train on a plain model."""
    sizes = sizes_to_adapt(model, config)
    with torch.device("meta"):
        of_size = {size: adapter_class(config)(config, *size) for size in set(sizes)}
    return sum(_numel(of_size[size].parameters()) for size in sizes)


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(prod(p.shape) for p in parameters)


def flops_per_token(model: nn.Module) -> FlopsPerToken:
    """Counts a forward's operations for a token, of the base and of the adapters, as the operators' headers state them.

    One adapter takes 2 ((r L + G N) n + N r m): L latents (N where each head has its own, by an A_i or a mask on x),
    N heads (1 without), G N columns of a linear router; a frozen offset adds 2 r (n + m). With an adapter for each
    task a token meets one of them. A router that looks at whole sequences costs nothing that counts for a token.

    Args:
        model: with adapters or without.
    """
    state = find_state(model)
    adapters = () if state is None else tuple(layer.adapter for layer in adapted_layers(model).values())
    inside = {part for adapter in adapters for part in adapter.modules()}
    linears = (module for module in model.modules() if module not in inside and is_linear(module))
    return FlopsPerToken(
        base=sum(2 * prod(features_of(linear)) for linear in linears),
        adapters=0 if state is None else sum(_adapter_flops(adapter, state.config) for adapter in adapters),
    )


def _adapter_flops(adapter: Adapter, config: AlignLoraConfig) -> int:
    n, m, r, heads = adapter.in_features, adapter.out_features, adapter.r, config.num_heads or 1
    logits = (config.routing_groups or 0) * heads if config.router == "linear" else 0
    offset = 2 * r * (n + m) if getattr(adapter, "lora_A0", None) is not None else 0
    return 2 * ((r * config.latents + logits) * n + heads * r * m) + offset
