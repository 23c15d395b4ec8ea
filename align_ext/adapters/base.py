"""The base class of all architectures, and the form in which they change a weight."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from align_ext.alignment.model_state import AlignState
from align_ext.alignment.step import AlignStep
from align_ext.alignment.tap import as_key
from align_ext.config import AlignLoraConfig
from align_ext.ops._projection import Weight

LowRankOutput = tuple[Tensor, Tensor, Tensor | None]  # y, z, w
Factors = tuple[Tensor, Tensor]  # A, B


class Captured(NamedTuple):
    """The latents and routing weights of one call of an adapter, without a graph.

    Attributes:
        z: latents [T, r], [T, N, r] where heads have latents of their own, or [T, k, r] of a token's k experts; T the
            tokens of the layer's input.
        w: a router's weights [T, G, N], of mixlora the probabilities of all experts; None without one.
    """

    z: Tensor
    w: Tensor | None


class SiblingArguments(NamedTuple):
    """What sibling_lora takes of a layer.

    Attributes:
        own: A, B, scaling, and R, A0, B0 where there are any: the layer's element of each list, by name.
        common: options that all layers must have alike.
    """

    own: dict[str, Any]
    common: dict[str, Any]


class Adapter(nn.Module):
    """The low-rank path of one layer: parameters, and one call of an op.

    A subclass makes its parameters (lora_A, lora_B and others, all starting with lora_) and overrides
    `reset_lora_parameters` (their first values), `low_rank_forward` (what it computes), and `delta_factors` (the change
    of the weight that this is) or `unmergeable_reason` (why it is none).

    Attributes:
        lora_magnitude_vector: m [out_features] of DoRA (adapters/dora.py), which the layer applies, or None.
        drops_whole_input: whether the layer drops x for the base as well (DoRA), so that the op gets it dropped.
        lora_bias: a bias [m] that is added to y, times the scaling; None without the option of this name.
        capture: a function that gets the latents of each forward (align_ext/adapters/capture.py), or None.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_magnitude_vector: nn.Parameter | None
    lora_bias: nn.Parameter | None
    capture: Callable[[Captured], None] | None = None

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.r, self.scaling, self.dropout_p = config.r, config.scaling, config.lora_dropout
        magnitude = nn.Parameter(torch.empty(out_features)) if config.use_dora else None
        self.register_parameter("lora_magnitude_vector", magnitude)
        self.drops_whole_input = config.use_dora and config.dropout_site == "input"
        self.register_parameter("lora_bias", nn.Parameter(torch.zeros(out_features)) if config.lora_bias else None)
        self.state: AlignState | None = None
        self.layer: int | None = None  # its number among those whose outputs a step records
        self.layer_key: Tensor | None = None  # the same for compiled graphs
        self.layer_index: Tensor | None = None  # and on the device of the parameters, [1], as of a step's opening

    @property
    def A(self) -> Tensor:
        """A as the operators take it, where it is not lora_A itself."""
        return self.lora_A

    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        """Gives the parameters their first values; weight: the base's [out, in], where the initialisation needs it."""
        raise NotImplementedError

    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        """Computes y, z and, with a router, its weights w; op holds the base."""
        raise NotImplementedError

    def join(self, state: AlignState, name: str) -> None:
        """Takes part in the model's steps under this name, if it has latents or routing weights for them."""
        self.state = state
        if state.config.align or (state.config.balance and getattr(self, "lora_router", None) is not None):
            self.layer = state.add_layer(name, self.r)
            self.layer_key = as_key(self.layer)

    def index_on(self, device: torch.device) -> None:
        """Puts the layer's index on the device of the parameters, for the forward to come."""
        if self.layer is not None and (self.layer_index is None or self.layer_index.device != device):
            self.layer_index = torch.tensor([self.layer], device=device)

    def forward(
        self, x: Tensor, weight: Weight = None, bias: Tensor | None = None, base_out: Tensor | None = None, **op: Any
    ) -> Tensor:
        """Computes base(x) + low rank for x [..., in_features]; the base is weight and bias, or what it returned."""
        step = self.step()
        dropout_p, rng = self.dropout(x, step)
        op |= {"rng": rng, "weight": weight, "bias": bias, "base_out": base_out}
        y, z, w = self.low_rank_forward(x, dropout_p, step, **op)
        return self.hand_over(step, x, y, z, w)

    def step(self) -> AlignStep | None:
        """The step that a forward now belongs to, if it needs one."""
        return None if self.state is None else self.state.find(self.training)

    def _records(self, step: AlignStep | None) -> bool:
        return step is not None and self.layer_key is not None and self.training and step.records

    def dropout(self, x: Tensor, step: AlignStep | None) -> tuple[float, Tensor | None]:
        """Dropout's probability now, and seed and offset of the mask where the step has them."""
        dropout_p = self.dropout_p if self.training and not self.drops_whole_input else 0.0
        return dropout_p, step.rng_of(self, x.device) if dropout_p > 0 and step and self._records(step) else None

    def hand_over(self, step: AlignStep | None, x: Tensor, y: Tensor, z: Tensor, w: Tensor | None = None) -> Tensor:
        """Gives z and w of a forward to who wants them; returns y with the step's gradients in both behind it.

        The bias is added here, in the wider of the two dtypes.
        """
        if self.lora_bias is not None:
            y = y.add(self.lora_bias, alpha=self.scaling).to(y.dtype)
        if self.capture is not None:
            self.capture(Captured(z.detach(), None if w is None else w.detach()))
        return step.tap(self, x, y, z, w) if step and self._records(step) else y

    def sibling_arguments(self) -> SiblingArguments | None:
        """What sibling_lora takes of the layer, if it computes what low_rank_forward does."""
        return None

    def delta_factors(self) -> list[Factors]:
        """Pairs A [r, n] and B [m, r] of which s Σ B A is the adapter's change of the base weight, DoRA apart.

        Raises:
            TypeError: it is none; unmergeable_reason says why.
        """
        raise TypeError(f"{type(self).__name__} is no fixed change of the weight: {self.unmergeable_reason()}")

    def uniform_delta_factors(self) -> list[Factors]:
        """The factors if the router gave all heads the same weight: an approximation."""
        return self.delta_factors()

    def delta_weight(self) -> Tensor:
        """Computes s Σ B A, [out_features, in_features], float32 (float64 for float64): without DoRA, the whole change.

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
