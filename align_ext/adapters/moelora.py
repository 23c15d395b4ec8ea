"""MOELoRA (2310.18339): LoRAs mixed by a gate that knows the task, and nothing of the token."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.base import Factors
from align_ext.adapters.by_task import TaskAdapter
from align_ext.config import AlignLoraConfig

_EMBEDDING = 64  # width of a task's embedding


class MoeLoraAdapter(TaskAdapter):
    """N experts with A and B of their own, weighed by the task k of the token.

        z_i = A_i dropout(x),   w_k = softmax(G e_k)
        y = base(x) + s Σ_i w_ki B_i z_i

    e_k [64] is a trained embedding of the task, G [N, 64] the layer's gate; the released code has one of each layer, as
    here, and another that all layers share. Of a named task it is one LoRA of rank N r, which the paper calls r,
    [w_k1 B_1 .. w_kN B_N] [A_1; ..; A_N]; those of all tasks, M m N r numbers, are made in each forward. Its alignment
    is the mean over the experts of that of their latents z_i.
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        assert config.num_heads is not None
        self.experts = config.num_heads
        self.lora_A = nn.Parameter(torch.empty(self.experts, self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(self.experts, out_features, self.r))
        self.lora_task = nn.Parameter(torch.empty(self.tasks, _EMBEDDING))
        self.lora_gate = nn.Parameter(torch.empty(self.experts, _EMBEDDING))

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        init.each(self.init, self.lora_A.data, self.lora_B.data)
        nn.init.normal_(self.lora_task)
        init.uniform(self.lora_gate.data)

    @override
    def factors_of_tasks(self) -> Factors:
        w = (self.lora_task @ self.lora_gate.T).softmax(1)
        B = torch.einsum("ki,imr->kmir", w, self.lora_B).flatten(2)
        return self.lora_A.flatten(0, 1).expand(self.tasks, -1, -1), B

    @override
    def latents(self, z: Tensor) -> Tensor:
        return z.unflatten(1, (self.experts, self.r))
