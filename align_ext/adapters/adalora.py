"""AdaLoRA (2303.10512): a triplet of vectors and a singular value for each rank, which training prunes."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters.base import Adapter, Factors, LowRankOutput
from align_ext.alignment.model_state import AlignState
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.losses.orthogonality import orthogonality
from align_ext.ops import grouped_lora

_STD = 0.02  # of P and Q at the start


class AdaLoraAdapter(Adapter):
    """One adapter in the form of an SVD: P [m, r] is lora_B, the diagonal of Λ [r, 1] lora_E, and Q [r, n] lora_A.

        z = Λ Q dropout(x)
        y = base(x) + s P z

    P and Q start from N(0, 0.02²), Λ from zero. What is aligned is z, which is zero in a dimension that is pruned, so
    that it takes no part in the alignment; a latent Q x would move the vectors of pruned triplets, and their importance
    with them. Λ Q is made in each forward, r n numbers, and is the A of grouped_lora. A rank that is pruned keeps its
    vectors and has the singular value 0 (model/rank_allocation.py).
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_A = nn.Parameter(torch.empty(self.r, in_features))
        self.lora_E = nn.Parameter(torch.empty(self.r, 1))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.r))

    @property
    def A(self) -> Tensor:
        """Λ Q."""
        return self.lora_E * self.lora_A

    @property
    def kept_rank(self) -> int:
        """The number of singular values that are not zero."""
        return int(torch.count_nonzero(self.lora_E.detach()))

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        nn.init.normal_(self.lora_A, std=_STD)
        nn.init.zeros_(self.lora_E)
        nn.init.normal_(self.lora_B, std=_STD)

    @override
    def join(self, state: AlignState, name: str) -> None:
        super().join(state, name)
        if state.config.orth_reg_weight:
            state.of_parameters.append(self.orthogonality)

    def orthogonality(self) -> Tensor:
        """This layer's orthogonality loss (align_ext/losses/orthogonality.py)."""
        P, Q = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in (self.lora_B, self.lora_A))  # FSDP2's
        return orthogonality(P, Q)

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        return *grouped_lora(x, self.A, self.lora_B, self.scaling, dropout_p=dropout_p, **op), None

    @override
    def delta_factors(self) -> list[Factors]:
        """(Λ Q, P)."""
        return [(self.A, self.lora_B)]


def ranks_above_target(adapters: Collection[Any], config: AlignLoraConfig) -> str:
    """Says that more triplets are left than the ranks are to end with, or "": also of other architectures.

    Args:
        adapters: those of all layers.
        config: their options.
    """
    if config.architecture != "adalora":
        return ""
    left, wanted = sum(adapter.kept_rank for adapter in adapters), config.final_rank * len(adapters)
    return f"the ranks of adalora add up to {left}, not target_r * layers = {wanted}" if left > wanted else ""
