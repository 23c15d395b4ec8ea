"""NLoRA (2502.14482): LoRA with a trained matrix between A and B, started from rows and columns of the weight."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.base import Adapter, Factors, LowRankOutput, offset_factors
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.ops import dropout_sum, grouped_lora


class NLoraAdapter(Adapter):
    """One adapter with a matrix N [r, r] in its middle.

        z = A dropout(x)
        y = base(x) + s (B N z - B0 A0 dropout(x))

    "nystrom" starts from the first r rows and columns of the base weight, A = W[:r], B = W[:, :r] and N = W[:r, :r]:
    the released code's, which takes the block itself and not the pseudo-inverse of Nyström's approximation of W. That
    start, A0 = A and B0 = B N, is frozen and subtracted, so that the adapter starts as no change. Other starts are
    SLoRA, the paper's adapter without it: N Kaiming uniform, B = 0 and no offset. What is aligned is z.
    """

    lora_A0: Tensor | None
    lora_B0: Tensor | None

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.init = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.r))
        self.lora_N = nn.Parameter(torch.empty(self.r, self.r))
        offset = self.init == "nystrom"
        self.register_buffer("lora_A0", torch.empty(self.r, in_features) if offset else None)
        self.register_buffer("lora_B0", torch.empty(out_features, self.r) if offset else None)

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        A, B, N = self.lora_A.data, self.lora_B.data, self.lora_N.data
        if self.lora_A0 is None:
            init.ZERO_PRODUCT[self.init](A, B)
            init.uniform(N)
            return
        assert weight is not None
        assert self.lora_B0 is not None
        init.nystrom(A, B, N, weight)
        self.lora_A0.copy_(A)
        self.lora_B0.copy_(B @ N)

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        A, B = self.lora_A, self.lora_B @ self.lora_N
        if self.lora_A0 is None:
            return *grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **op), None
        op |= {"A0": self.lora_A0, "B0": self.lora_B0, "site": "input"}
        return *dropout_sum(x, A, B[None], self.scaling, dropout_p=dropout_p, **op), None

    @override
    def delta_factors(self) -> list[Factors]:
        """(A, B N), and the offset (A0, -B0) of a start from the weight."""
        return [(self.lora_A, self.lora_B @ self.lora_N), *offset_factors(self.lora_A0, self.lora_B0)]
