"""MixLoRA (2404.15159): experts that are whole feed-forward blocks, of which a router chooses k for each token.

    p = softmax(R x / tau)          [T, N], x the block's input
    w = p_i / Σ_j p_j               over the k experts of the largest p, 0 elsewhere
    y = Σ_i w_i FFN_i(x)            FFN_i: the frozen block, each linear layer of it with a LoRA of expert i

The block runs once, on k rows for each token in place of one, and is never looked into: a hook before it chooses the
experts and repeats what it gets, its adapted layers take the LoRA of each row's expert (one group of grouped_lora an
expert), and a hook after it adds each token's rows up by their weights. So any block will do whose rows do not see one
another. What the base computes of the block's own input is computed once for each token; all behind it, k times.
"""

from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.adapters.base import Adapter, Factors, LowRankOutput, at_least_float32
from align_ext.adapters.lora import LoraAdapter
from align_ext.adapters.router import LinearRouter
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.ops import group_rows, grouped_lora
from align_ext.ops._projection import Weight


@dataclass(frozen=True)
class Rows:
    """The rows of T tokens, k in a row for each: those of its experts, the likeliest first.

    Attributes:
        tokens: x [..., S, h], what the block got.
        repeated: [..., S k, h], what it runs on.
        probabilities: p [T, N].
        weights: w [..., S, k].
        order: the rows in the order of their experts, as group_rows returns them.
    """

    tokens: Tensor
    repeated: Tensor
    probabilities: Tensor
    weights: Tensor
    order: Tensor

    @classmethod
    def of(cls, x: Tensor, logits: Tensor, k: int) -> "Rows":
        """Chooses the experts by logits [T, N] of the tokens x [..., h]."""
        p = logits.softmax(-1)
        largest, experts = p.topk(k, -1)
        weights = (largest / largest.sum(-1, keepdim=True)).view(*x.shape[:-1], k)
        return cls(x, x.repeat_interleave(k, -2), p, weights, group_rows(experts.flatten(), p.shape[-1]))

    def repeat(self, tensor: Tensor) -> Tensor:
        """A tensor [..., S, m] of the tokens for the rows, [..., S k, m]."""
        return tensor.repeat_interleave(self.weights.shape[-1], -2)

    def mix(self, y: Tensor) -> Tensor:
        """Computes Σ_i w_i y_i of each token, [..., S, m] in y's dtype, of the rows y [..., S k, m]."""
        return (y.unflatten(-2, self.weights.shape[-2:]) * self.weights[..., None]).sum(-2).to(y.dtype)


class Mixture:
    """What the adapted layers of one block share: the rows of the forward that is running, or None."""

    rows: Rows | None = None


class BlockRouter(LinearRouter):
    """Logits R x of each token in float32, whatever the dtype of the base: R [N, h]."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes [T, N] for x [..., h]."""
        kind = x.device.type
        has_autocast = torch.amp.is_autocast_available(kind)
        with torch.autocast(kind, enabled=False) if has_autocast else nullcontext():
            return nn.functional.linear(at_least_float32(x).flatten(0, -2), at_least_float32(self.lora_R))


class MixLoraAdapter(Adapter):
    """The LoRAs of N experts in one layer of their block; i is the expert of a row.

        z = A_i dropout(x)              [T, k, r], for each token those of its k experts
        y = base(x) + s B_i z

    lora_A is [N, r, n], lora_B [N, m, r]. The first adapted layer of a block holds its router, R [N, h], and hands over
    p, of which the balance is. The alignment is the mean over the k places of that of the latents there: of the
    likeliest experts of all tokens, of their second ones, ...

    Args:
        config: the options.
        in_features: n.
        out_features: m.
        hidden: h, the width of the block's input, where it is known.
        routes: whether the layer holds the router.
    """

    lora_router: BlockRouter | None

    def __init__(
        self, config: AlignLoraConfig, in_features: int, out_features: int, hidden: int = 0, routes: bool = False
    ) -> None:
        super().__init__(config, in_features, out_features)
        assert config.num_heads is not None
        self.config, self.experts, self.top_k, self.hidden = config, config.num_heads, config.latents, hidden
        self.lora_A = nn.Parameter(torch.empty(self.experts, self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(self.experts, out_features, self.r))
        self.register_module("lora_router", BlockRouter(hidden, self.experts) if routes else None)
        self.block = ""  # the name of the layer's block in the model
        self.mixture = Mixture()

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        init.each(self.config.init_lora_weights, self.lora_A.data, self.lora_B.data)
        if self.lora_router is not None:
            self.lora_router.reset(zeros=self.config.router_init == "zeros")

    @property
    def rows(self) -> Rows:
        """The rows that the block runs on.

        Raises:
            RuntimeError: it does not run.
        """
        if self.mixture.rows is None:
            raise RuntimeError(
                f"a layer of the experts of {self.block!r} ran, but not its block, which chooses among them: call the "
                "block as a module, or leave its layers out by exclude_modules"
            )
        return self.mixture.rows

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        rows = self.rows
        y, z = grouped_lora(x, self.lora_A, self.lora_B, self.scaling, dropout_p=dropout_p, order=rows.order, **op)
        z = z.unflatten(0, (len(rows.probabilities), self.top_k))
        return y, z, None if self.lora_router is None else rows.probabilities[:, None]

    @override
    def hand_over(self, step: AlignStep | None, x: Tensor, y: Tensor, z: Tensor, w: Tensor | None = None) -> Tensor:
        return super().hand_over(step, self.rows.tokens, y, z, w)  # whose layout tells what the batch is

    @override
    def uniform_delta_factors(self) -> list[Factors]:
        """A [N r, n] and B [m, N r] / N: the mean of the experts' changes of the layer."""
        return [(self.lora_A.flatten(0, 1), at_least_float32(self.lora_B).transpose(0, 1).flatten(1) / self.experts)]

    def unmergeable_reason(self) -> str:
        """Why not: the weight depends on the token."""
        return "its block's router chooses experts anew for every token, and mixes what they return: keep the adapter"


class LoraBesideExperts(LoraAdapter):
    """One LoRA beside a layer that is in no feed-forward block: attention's, in MixLoRA.

    It hands its latents over once for each of the k places, [T, k, r], as the experts do theirs.
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.places = config.latents

    @override
    def hand_over(self, step: AlignStep | None, x: Tensor, y: Tensor, z: Tensor, w: Tensor | None = None) -> Tensor:
        return super().hand_over(step, x, y, z[:, None].expand(-1, self.places, -1), w)


class ExpertLinear(AdaptedLinear):
    """A frozen layer of a block with the LoRAs of its experts."""

    adapter: MixLoraAdapter

    @override
    def base_arguments(self, x: Tensor) -> tuple[Tensor, Weight, Tensor | None, Tensor | None]:
        """The base in the form that the ops take; what it makes of the block's own input is made once a token."""
        rows = self.adapter.rows
        if x is not rows.repeated:
            return super().base_arguments(x)
        base_out = rows.repeat(self._base_out(rows.tokens))
        return x.to(base_out.dtype), None, None, base_out

    @override
    def base_unmergeable_reason(self) -> str:
        """Why nothing can be merged, not even an approximation: a block of mean weights is no mean of blocks."""
        return self.adapter.unmergeable_reason()


def mix_blocks(model: nn.Module, layers: Mapping[str, Any]) -> tuple[RemovableHandle, ...]:
    """Registers what chooses the experts before each block and adds their outputs up behind it; returns the handles.

    Args:
        model: the model, with the adapted layers in it.
        layers: all adapted layers by name.
    """
    blocks = defaultdict[str, dict[str, MixLoraAdapter]](dict)
    for name, layer in layers.items():
        if isinstance(layer, ExpertLinear):
            blocks[layer.adapter.block][name] = layer.adapter
    handles = []
    for block, adapters in blocks.items():
        mixture = Mixture()
        for adapter in adapters.values():
            adapter.mixture = mixture
        routing = next(name for name, adapter in adapters.items() if adapter.lora_router is not None)
        module = model.get_submodule(block)
        before = partial(_before_block, mixture, routing.removeprefix(f"{block}."))
        handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            # Also after an error, with which the rows' memory goes.
            module.register_forward_hook(partial(_after_block, mixture), always_call=True),
        ]
    return tuple(handles)


def _before_block(
    mixture: Mixture, routing: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Gives the block k rows for each token, of its input and of what else it gets for each token (a residual)."""
    layer: Any = block.get_submodule(routing)
    if layer.disabled:
        return None
    x: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    adapter: MixLoraAdapter = layer.adapter
    assert adapter.lora_router is not None
    logits = adapter.lora_router(x) / adapter.config.router_temperature
    rows = mixture.rows = Rows.of(x, logits, adapter.top_k)

    def of_rows(value: Any) -> Any:
        if value is x:
            return rows.repeated
        of_tokens = isinstance(value, Tensor) and value.dim() == x.dim() and value.shape[:-1] == x.shape[:-1]
        return rows.repeat(value) if of_tokens else value

    return tuple(map(of_rows, args)), {name: of_rows(value) for name, value in kwargs.items()}


def _after_block(mixture: Mixture, block: nn.Module, args: Any, output: Any) -> Any:
    """Mixes the rows of the block's output, a tensor or a tuple that begins with it."""
    rows, mixture.rows = mixture.rows, None
    if rows is None or output is None:
        return None
    return (rows.mix(output[0]), *output[1:]) if isinstance(output, tuple) else rows.mix(output)
