"""MALoRA (2410.22782): routed experts whose A_i lie in one subspace of the input, which all share."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.multi_head import RoutedAdapter
from align_ext.config import AlignLoraConfig


class MaLoraAdapter(RoutedAdapter):
    """Experts with a small matrix C_i [r, d] each on a shared projection S [d, n], and B_i of their own.

        z_i = C_i S dropout(x),   w = softmax over the top_k largest of R x, 0 elsewhere
        y = base(x) + s Σ_i w_i B_i z_i

    S is lora_A, and d is shared_rank: below r it would take rank from the experts, and at d = r they would be
    HydraLoRA's heads, B_i C_i on one A. The products A_i = C_i S are made once a forward, for routed_lora. S and C_i
    start Kaiming uniform (the paper takes S from an SVD of random A_i), B_i = 0. Its alignment is the mean over the
    experts of that of their latents z_i.
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        assert config.shared_rank is not None
        self.lora_A = nn.Parameter(torch.empty(config.shared_rank, in_features))
        self.lora_C = nn.Parameter(torch.empty(self.heads, self.r, config.shared_rank))

    @property
    @override
    def A(self) -> Tensor:
        return self.lora_C @ self.lora_A

    @override
    def sibling_arguments(self) -> None:
        """None: its A_i are no parameters, but made of them in each forward."""
        return None

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        super().reset_lora_parameters(weight)
        init.uniform(self.lora_C.data)
