"""The cost of adapters: trained parameters, the rank for a parameter budget, and floating-point operations."""

from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from align_ext.adapters import make_adapter
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.base import Adapter
from align_ext.adapters.embedding import EmbeddingAdapter
from align_ext.adapters.linear_layer import features_of
from align_ext.adapters.mixlora import MixLoraAdapter
from align_ext.alignment.guards import check_model
from align_ext.alignment.model_state import find_state
from align_ext.base_model.select_layers import is_linear
from align_ext.config import AlignLoraConfig
from align_ext.model.replace import layers_to_adapt
from align_ext.system.names import Matcher


@dataclass(frozen=True)
class ParameterCount:
    """The parameter counts of a model.

    Attributes:
        trainable: the parameters that require a gradient, including those of routers.
        total: all parameters; a shared one counts once, and a 4-bit weight of bitsandbytes counts the elements that it
            stands for, two in a byte.
        router: the parameters of the adapters' routers.
    """

    trainable: int
    total: int
    router: int

    @property
    def percent(self) -> float:
        """The percentage of trainable parameters."""
        return 100 * self.trainable / max(self.total, 1)

    def __str__(self) -> str:
        routers = f", {self.router:,} of them in routers" if self.router else ""
        return f"{self.trainable:,} of {self.total:,} parameters are trained ({self.percent:.3g}%){routers}"


@dataclass(frozen=True)
class FlopsPerToken:
    """Floating-point operations of a forward pass per token; a multiplication and an addition count as two.

    Attributes:
        base: the operations of the model's linear layers, 2 n m each, without the attention scores, which grow with the
            number of tokens, and without experts that are no linear layers.
        adapters: the operations of the adapters' matrix products in training.
    """

    base: int
    adapters: int

    def __str__(self) -> str:
        percent = 100 * self.adapters / max(self.base, 1)
        return f"{self.base:,} FLOPs a token in the base, {self.adapters:,} in the adapters ({percent:.3g}%)"


def count_parameters(model: nn.Module) -> ParameterCount:
    """Counts the trainable, total and router parameters of any model, with or without adapters."""
    check_model(model)
    named = list(model.named_parameters())
    return ParameterCount(
        trainable=sum(p.numel() for _, p in named if p.requires_grad),
        total=_numel(p for _, p in named),
        router=sum(p.numel() for name, p in named if ".lora_router." in name),
    )


def match_rank(config: AlignLoraConfig, model: nn.Module, budget: int | AlignLoraConfig) -> int:
    """Finds the largest rank whose trained parameters do not exceed a budget: LoRA-dagger of 2508.05078.

    Architectures are compared fairly at equal numbers of parameters: a LoRA matched to HydraLoRA has a larger rank. No
    adapter is inserted, so the model may be on the meta device. To use the result: dataclasses.replace(config, r=r).

    Args:
        config: the options of the architecture; r is ignored.
        model: a plain model; the layers that config would adapt are counted.
        budget: a number of trained parameters, or a config whose number on the same model is the budget.

    Returns:
        The rank, at most the smallest width of a layer (B A cannot have a larger rank); even for orthogonal heads.

    Raises:
        ValueError: the budget is too small for any rank, the model has adapters already, or no layer matches.
    """
    if find_state(model) is not None:
        raise ValueError("the model has adapters already: give the plain model, or unload(model) first")
    allowed = trained_parameters(budget, model) if isinstance(budget, AlignLoraConfig) else budget
    step = 2 if config.init_lora_weights == "orthogonal" else 1
    minimum = trained_parameters(replace(config, r=step), model)
    if allowed < minimum:
        raise ValueError(
            f"budget={allowed:,} is below {minimum:,}, what {config.architecture!r} trains at r={step}: give it more, "
            "fewer heads, or fewer layers"
        )
    max_rank = min(min(sizes[:2]) for sizes in layers_to_adapt(model, config).values())
    ranks = range(step, max_rank + 1, step)
    found = bisect_right(ranks, allowed, key=lambda r: trained_parameters(replace(config, r=r), model))
    return ranks[found - 1]


def trained_parameters(config: AlignLoraConfig, model: nn.Module) -> int:
    """Returns the number of parameters that a config would train on a plain model, which may be on the meta device."""
    return sum(_numel(adapter.parameters()) for adapter in planned_adapters(config, model))


def planned_adapters(config: AlignLoraConfig, model: nn.Module) -> list[Adapter]:
    """Returns an adapter on the meta device for each layer or block of a plain model that a config would adapt."""
    made, matcher, found = dict[tuple[int, ...], Adapter](), Matcher(), []
    with torch.device("meta"):
        for name, size in layers_to_adapt(model, config).items():
            options = config.of_layer(name, matcher)
            key = (*size, options.r)
            if key not in made:
                made[key] = make_adapter(options, *size)
            found.append(made[key])
    return found


def _numel(parameters: Iterable[nn.Parameter]) -> int:
    return sum(prod(getattr(getattr(p, "quant_state", None), "shape", p.shape)) for p in parameters)


def flops_per_token(model: nn.Module) -> FlopsPerToken:
    """Counts the operations of a forward pass per token, for the base and for the adapters (formulas: csrc/ops/*.h).

    One adapter takes 2 ((r L + G N) n + N r m): L latents (N if each head has its own A_i or mask on x, else 1), N
    heads (else 1), G N outputs of a linear router; a frozen offset adds 2 r (n + m). Of adapters by task, a token uses
    those of one; of a mixture's experts, those of one are counted. In a block of mixlora a token goes through k LoRAs,
    2 k r (n + m), of a router with 2 N n for all layers, and the base's 2 n m are made k times in layers that do not
    take the block's own input (which are told by their width). The cost per token of a sequence router is
    negligible. DoRA with dropout of x adds the base's 2 n m for the dropped x; its norms take 2 r n m in each forward,
    whatever the number of tokens, and are left out.

    Args:
        model: a model with or without adapters.
    """
    state = find_state(model)
    adapters = () if state is None else tuple(layer.adapter for layer in adapted_layers(model).values())
    inside = {part for adapter in adapters for part in adapter.modules()}
    linears = (module for module in model.modules() if module not in inside and is_linear(module))
    return FlopsPerToken(
        base=sum(2 * prod(features_of(linear)) for linear in linears),
        adapters=0 if state is None else sum(adapter_flops(adapter, state.config) for adapter in adapters),
    )


def adapter_flops(adapter: Adapter, config: AlignLoraConfig) -> int:
    """Counts the operations of one adapter per token (see flops_per_token)."""
    if isinstance(adapter, MixLoraAdapter):
        return _flops_in_block(adapter)
    n = 0 if isinstance(adapter, EmbeddingAdapter) else adapter.in_features  # which looks A's columns up
    one = config.row.mixture  # a LoRA beside the blocks
    m, r, heads = adapter.out_features, adapter.r * config.row.paths, 1 if one else config.num_heads or 1
    logits = (config.routing_groups or 0) * heads if config.router == "linear" else 0
    offset = 2 * r * (n + m) if getattr(adapter, "lora_A0", None) is not None else 0
    again = 2 * n * m if adapter.drops_whole_input and adapter.dropout_p > 0 else 0
    return 2 * ((r * (1 if one else config.latents) + logits) * n + heads * r * m) + offset + again


def _flops_in_block(adapter: MixLoraAdapter) -> int:
    n, m, k = adapter.in_features, adapter.out_features, adapter.top_k
    logits = 0 if adapter.lora_router is None else adapter.lora_router.lora_R.numel()
    again = (k - 1) * n * m if n != adapter.hidden else 0
    return 2 * (k * adapter.r * (n + m) + logits + again)
