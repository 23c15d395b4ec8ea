"""LoRA (Hu et al. 2021, 2106.09685) and Align-LoRA (2508.05078)."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.base import Adapter, Factors, LowRankOutput, SiblingArguments, offset_factors
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.ops import dropout_sum, grouped_lora


class LoraAdapter(Adapter):
    """One adapter.

        z = A dropout(x)                [T, r]
        y = base(x) + s B z             [..., m]
        y = base(x) + s (B z + b)       with lora_bias

    With alignment (Align-LoRA, eq. 2), z is what is aligned. A PiSSA start keeps B0 A0 = B A of the start, frozen:
    y = base(x) + s (B z - B0 A0 dropout(x)), and the base weight is never touched.
    """

    lora_A0: Tensor | None
    lora_B0: Tensor | None

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.init = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.r))
        offset = self.init == "pissa"
        self.register_buffer("lora_A0", torch.empty(self.r, in_features) if offset else None)
        self.register_buffer("lora_B0", torch.empty(out_features, self.r) if offset else None)

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        A, B = self.lora_A, self.lora_B
        if self.init == "pissa":
            assert weight is not None
            assert self.lora_A0 is not None
            assert self.lora_B0 is not None
            init.pissa(A.data, B.data, weight, self.scaling)
            self.lora_A0.copy_(A.detach())
            self.lora_B0.copy_(B.detach())
        else:
            init.ZERO_PRODUCT[self.init](A.data, B.data)

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        A, B = self.lora_A, self.lora_B
        if self.init != "pissa":
            return *grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **op), None
        op |= {"A0": self.lora_A0, "B0": self.lora_B0, "site": "input"}
        return *dropout_sum(x, A, B[None], self.scaling, dropout_p=dropout_p, **op), None

    @override
    def sibling_arguments(self) -> SiblingArguments | None:
        own = {"A": self.lora_A, "B": self.lora_B, "scaling": self.scaling}
        if self.init == "pissa":
            own |= {"A0": self.lora_A0, "B0": self.lora_B0}
        return SiblingArguments(own, {"site": "input"})

    @override
    def delta_factors(self) -> list[Factors]:
        """(A, B), and the offset (A0, -B0) of a PiSSA start."""
        return [(self.lora_A, self.lora_B), *offset_factors(self.lora_A0, self.lora_B0)]
