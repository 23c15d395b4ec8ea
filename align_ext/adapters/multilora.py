"""MultiLoRA (2311.11501): LoRAs in parallel, each with a trained scaling of every output."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.base import Factors, LowRankOutput
from align_ext.adapters.multi_head import HeadsAdapter
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.ops import grouped_lora


class MultiLoraAdapter(HeadsAdapter):
    """N parallel LoRAs with trained scalings c_i [m], which are zero at the start, so that B_i need not be.

        z_i = A_i dropout(x)
        y = base(x) + s Σ_i c_i * B_i z_i

    A_i and B_i are Kaiming uniform. It is one LoRA of rank N r, [c_1 B_1 .. c_N B_N] [A_1; ..; A_N], in one call of
    grouped_lora. The paper has no further factor: lora_alpha = r makes s = 1. Its alignment is the mean over the N
    latents z_i.
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_scaling = nn.Parameter(torch.empty(self.heads, out_features))

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        super().reset_lora_parameters(weight)
        if self.config.init_lora_weights != "orthogonal":  # which leaves no B of zeros
            init.uniform(self.lora_B.data)
        nn.init.zeros_(self.lora_scaling)

    def _scaled(self) -> Tensor:
        return self.lora_scaling[..., None] * self.lora_B

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        A, B = self.lora_A.flatten(0, 1), self._scaled().transpose(0, 1).flatten(1)
        y, z = grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **op)
        return y, z.unflatten(1, (self.heads, self.r)), None

    @override
    def delta_factors(self) -> list[Factors]:
        """(A_i, c_i B_i) of each LoRA."""
        return list(zip(self.lora_A, self._scaled(), strict=True))

    @override
    def uniform_delta_factors(self) -> list[Factors]:
        """The same: there is no router."""
        return self.delta_factors()
