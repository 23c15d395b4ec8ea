"""LoRA (Hu et al. 2021, 2106.09685) and Align-LoRA (2508.05078, eq. 2): y = W x + b + s B A dropout(x)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from align_ext.batch import AlignState
from align_ext.nn.base import AdaptedLinear
from align_ext.ops import grouped_lora


class LoraLinear(AdaptedLinear):
    """One adapter beside a frozen linear layer.

        z = A dropout(x)            [T, r]
        y = base(x) + s B z         [..., out]

    With alignment on (Align-LoRA), a training forward hands z to the current step, and backward adds the alignment's
    gradient to dz.
    """

    def __init__(self, base_layer: nn.Module, r: int, scaling: float, dropout_p: float, dtype: torch.dtype) -> None:
        super().__init__(base_layer)
        self.r, self.scaling, self.dropout_p = r, scaling, dropout_p
        tensors = (*base_layer.parameters(), *base_layer.buffers())  # packed weights are buffers
        device = tensors[0].device if tensors else torch.device("cpu")
        hook = getattr(base_layer, "_hf_hook", None)  # offloaded weights rest on meta and run elsewhere
        device = torch.device(getattr(hook, "execution_device", None) or device)
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=device, dtype=dtype)
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=device, dtype=dtype)
        self.state: AlignState | None = None
        self.slot: Tensor | None = None
        self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """A ~ kaiming uniform(sqrt 5), B = 0: the adapter starts as no change (PEFT's default)."""
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B.weight)

    def align(self, state: AlignState, name: str) -> None:
        """Takes part in the model's alignment under this name."""
        self.state, self.slot = state, state.add_layer(name, self.r)

    def forward(self, x: Tensor) -> Tensor:
        """Computes base(x) + s B A dropout(x) for x [..., in_features]."""
        x, base = self.base_arguments(x)
        A, B = self.lora_A.weight, self.lora_B.weight
        dropout_p = self.dropout_p if self.training else 0.0
        step = self.state.find() if self.training and self.state is not None else None
        if step is None or self.slot is None:
            return grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **base)[0]
        y, z = grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **base, step=step.key, slot=self.slot)
        step.keep(self.slot, z.detach())
        return y

    def delta_weight(self) -> Tensor:
        """S B A, [out_features, in_features], float32 (float64 for float64)."""
        A, B = self.lora_A.weight, self.lora_B.weight
        acc = torch.promote_types(A.dtype, torch.float32)
        return self.scaling * (B.to(acc) @ A.to(acc))

    def extra_repr(self) -> str:
        """The adapter's options."""
        return f"r={self.r}, scaling={self.scaling:g}, dropout_p={self.dropout_p:g}"
