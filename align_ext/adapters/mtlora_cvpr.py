"""MTLoRA (CVPR 2024): a low-rank path that all tasks share, beside one of each task."""

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.base import Factors
from align_ext.adapters.by_task import TaskAdapter
from align_ext.config import AlignLoraConfig


class MtLoraCvprAdapter(TaskAdapter):
    """A task-agnostic LoRA A_0, B_0 and a task-specific one A_k, B_k of each task; k is the task of the token.

        z = A_0 dropout(x)
        y = base(x) + s (B_0 z + B_k A_k dropout(x))

    The paper's model has a stream of features for each task, and the shared one beside them; where each token is of one
    task, there is one stream with both ("matrixv2" of the released code). Of a named task it is one LoRA of rank 2 r,
    [B_0 B_k] [A_0; A_k]. Its alignment is that of the shared latents z.
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_A = nn.Parameter(torch.empty(1 + self.tasks, self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(1 + self.tasks, out_features, self.r))

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        init.each(self.init, self.lora_A.data, self.lora_B.data)

    @override
    def factors_of_tasks(self) -> Factors:
        A, B = ([p[:1].expand(self.tasks, -1, -1), p[1:]] for p in (self.lora_A, self.lora_B))
        return torch.cat(A, 1), torch.cat(B, 2)

    @override
    def latents(self, z: Tensor) -> Tensor:
        return z[:, : self.r].contiguous()
