"""The base classes of architectures with N heads B_i: parameters, first values, frozen offset, spectral loss."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init, router
from align_ext.adapters.base import Adapter, Factors, LowRankOutput, SiblingArguments, at_least_float32, offset_factors
from align_ext.alignment.model_state import AlignState
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.losses.spectral import overlap, projectors, self_orthogonality
from align_ext.ops import dropout_sum


class HeadsAdapter(Adapter):
    """N heads B_i [N, m, r] on one A [r, n], or on one A_i of each head, [N, r, n].

    Heads that do not start from zero (R-LoRA) keep A0 = A and B0 = the mean (sum) of the B_i of the start, frozen:
    - s B0 A0 x is added, so that the adapter starts as no change and the base weight is never touched.
    """

    lora_A0: Tensor | None
    lora_B0: Tensor | None
    lora_P: Tensor | None
    lora_age: Tensor | None

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        assert config.num_heads is not None
        self.heads, self.site, self.config = config.num_heads, config.dropout_site, config
        self.A_per_head = config.row.A_per_head
        own = (self.heads,) if self.A_per_head else ()
        self.lora_A = nn.Parameter(torch.empty(*own, self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(self.heads, out_features, self.r))
        offset = config.init_lora_weights == "random_heads"
        self.register_buffer("lora_A0", torch.empty(self.r, in_features) if offset else None)
        self.register_buffer("lora_B0", torch.empty(out_features, self.r) if offset else None)
        paper = config.spectral == "paper"
        self.register_buffer("lora_P", torch.empty(self.heads, self.r, self.r) if paper else None)
        self.register_buffer("lora_age", torch.zeros((), dtype=torch.int64) if paper else None)

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        A, B, kind = self.lora_A.data, self.lora_B.data, self.config.init_lora_weights
        if kind == "random_heads":
            init.random_heads(A, B, self.config.init_gamma)
            assert self.lora_A0 is not None
            assert self.lora_B0 is not None
            self.lora_A0.copy_(A)
            self.lora_B0.copy_(self._collapsed(B))
        else:
            init.ZERO_PRODUCT[kind](A, B)
        if self.lora_P is not None:
            assert self.lora_age is not None
            self.lora_P.copy_(torch.eye(self.r).expand_as(self.lora_P))
            self.lora_age.zero_()

    def _collapsed(self, B: Tensor) -> Tensor:
        """The heads as one, with the weights of the start: their sum or mean."""
        return B.mean(0)

    @property
    def offset(self) -> dict[str, Tensor | None]:
        """A0 and B0 as the ops take them."""
        return {"A0": self.lora_A0, "B0": self.lora_B0}

    def _own(self) -> dict[str, Any]:
        """A, B, scaling and offset of the layer, as sibling_lora takes them."""
        offset = {} if self.lora_A0 is None else self.offset
        return {"A": self.lora_A, "B": self.lora_B, "scaling": self.scaling, **offset}

    @override
    def uniform_delta_factors(self) -> list[Factors]:
        """(A, c Σ_i B_i) and the offset (A0, -B0), the heads of equal weight; an A_i of each head makes A [N r, n]."""
        if self.A_per_head:
            return [(self.A.flatten(0, 1), at_least_float32(self.lora_B).transpose(0, 1).flatten(1) / self.heads)]
        return [
            (self.lora_A, self._collapsed(at_least_float32(self.lora_B))),
            *offset_factors(self.lora_A0, self.lora_B0),
        ]

    @override
    def join(self, state: AlignState, name: str) -> None:
        super().join(state, name)
        if state.config.spectral:
            state.of_parameters.append(self.spectral_loss)

    def spectral_loss(self) -> Tensor:
        """This layer's spectral loss (align_ext/losses/spectral.py); refreshes the projectors when they are due."""
        B = self.lora_B
        B = B.full_tensor() if hasattr(B, "full_tensor") else B  # sharded by FSDP2
        if self.config.spectral == "released":
            return self_orthogonality(B)
        if self.lora_P is not None:
            with torch.no_grad():
                self._refresh(B)
        # A copy: a refresh before this loss's backward, or DDP's broadcast of buffers, would change it in place.
        return overlap(B, None if self.lora_P is None else self.lora_P.clone())

    def _refresh(self, B: Tensor) -> None:
        """Every k forwards; at each one while the heads are zero, for then there is nothing to learn from them."""
        assert self.lora_P is not None
        assert self.lora_age is not None
        if int(self.lora_age) % self.config.spectral_steps == 0:
            self.lora_P.copy_(projectors(B))
        if int(self.lora_age) > 0 or bool(B.any()):
            self.lora_age += 1


class SummedAdapter(HeadsAdapter):
    """Heads without a router: y = base(x) + s c Σ_i B_i u_i, with a dropout mask for each head."""

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        reduce: Any = self.config.reduce
        options = {"reduce": reduce, "site": self.site, "dropout_p": dropout_p, **self.offset}
        A, B = self.lora_A, self.lora_B
        return *dropout_sum(x, A, B, self.scaling, **options, **op), None

    @override
    def sibling_arguments(self) -> SiblingArguments | None:
        if self.site == "input_per_head":  # as many masks on x as there are heads
            return None
        return SiblingArguments(self._own(), {"reduce": self.config.reduce, "site": self.site})

    def _collapsed(self, B: Tensor) -> Tensor:
        return B.mean(0) if self.config.reduce == "mean" else B.sum(0)

    @override
    def delta_factors(self) -> list[Factors]:
        """(A, c Σ_i B_i) and the offset: without dropout the sum of the heads is one adapter, exactly."""
        return self.uniform_delta_factors()


class RoutedAdapter(HeadsAdapter):
    """Heads mixed by a router: y = base(x) + s Σ_i w_i B_i u_i, w = softmax(R x / tau), in G groups of outputs."""

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        groups = config.routing_groups
        if groups is None or out_features % groups:
            raise ValueError(
                f"routing_groups={groups} does not divide the {out_features} outputs of a layer: choose a divisor"
            )
        self.lora_router = router.make(config, in_features, groups * self.heads)

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        super().reset_lora_parameters(weight)
        self.lora_router.reset(zeros=self.config.router_init == "zeros")

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        options = {
            "top_k": self.config.top_k or None, "tau": self.config.router_temperature, "site": self.site,
            "dropout_p": dropout_p, **self.offset,
        }  # fmt: skip
        return self.lora_router.route(self, x, current, **options, **op)

    @override
    def sibling_arguments(self) -> SiblingArguments | None:
        if not isinstance(self.lora_router, router.LinearRouter) or self.site == "input_per_head":
            return None
        common = {"top_k": self.config.top_k or None, "tau": self.config.router_temperature, "site": self.site}
        return SiblingArguments(self._own() | {"R": self.lora_router.lora_R}, common)

    def unmergeable_reason(self) -> str | None:
        """Why not: the weight depends on the input."""
        return "its router mixes the heads anew for every input: keep the adapter, or merge with approximate='uniform'"
