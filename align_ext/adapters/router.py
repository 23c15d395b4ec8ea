"""Routers: what gives the heads of a layer their weights, for each token or for each sequence."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.ops import routed_lora

_HIDDEN = 64  # width of the MLP router's hidden layer


class LinearRouter(nn.Module):
    """Logits R x of each token, on x without dropout; part of the op. R [G N, n]."""

    def __init__(self, in_features: int, logits: int) -> None:
        super().__init__()
        self.lora_R = nn.Parameter(torch.empty(logits, in_features))

    def reset(self, *, zeros: bool) -> None:
        """Kaiming uniform, or zeros: uniform weights."""
        _reset(self.lora_R, zeros=zeros)

    def route(
        self, adapter: Any, x: Tensor, current: AlignStep | None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes y, z, w of an adapter."""
        A, B = adapter.A, adapter.lora_B
        return routed_lora(x, A, B, self.lora_R, adapter.scaling, **options)


class SequenceRouter(nn.Module):
    """Logits R relu(H mean_t x_t) of each sequence: the router that mtLoRA (2603.01526) describes.

    The mean is over the tokens before the sequence's first label, padding excluded, so that no token's weights depend
    on tokens after it; while a sequence is generated its weights stay those of its prompt. H [64, n], R [G N, 64].
    """

    def __init__(self, in_features: int, logits: int) -> None:
        super().__init__()
        self.lora_H = nn.Parameter(torch.empty(_HIDDEN, in_features))
        self.lora_R = nn.Parameter(torch.empty(logits, _HIDDEN))
        self._of_prompt: Tensor | None = None  # logits of the sequences that are being generated

    def reset(self, *, zeros: bool) -> None:
        """Kaiming uniform, or zeros for R: uniform weights."""
        _reset(self.lora_H, zeros=False)
        _reset(self.lora_R, zeros=zeros)

    def logits(self, x: Tensor, current: AlignStep | None) -> Tensor:
        """Computes [B, G N] for x [B, S, n]."""
        if x.dim() != 3:
            raise RuntimeError(f'routing="sequence" needs x [batch, tokens, features], but a layer got {list(x.shape)}')
        if current is not None and current.decoding:
            if self._of_prompt is None or len(self._of_prompt) != len(x):
                raise RuntimeError(f"the model decodes {len(x)} sequences whose prompt it did not see in eval mode")
            return self._of_prompt
        prompt = None if current is None else current.prompt
        mask = x.new_ones(x.shape[:2]) if prompt is None else prompt.to(x)
        if mask.shape != x.shape[:2]:
            raise RuntimeError(f"the prompts' mask is {list(mask.shape)}, but a layer saw {list(x.shape[:2])} tokens")
        mean = (mask[..., None] * x).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        hidden = torch.relu(linear(mean, self.lora_H.to(x.dtype)))
        logits = linear(hidden, self.lora_R.to(x.dtype))
        if not self.training:
            self._of_prompt = logits.detach()
        return logits

    def route(
        self, adapter: Any, x: Tensor, current: AlignStep | None, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Computes y, z, w of an adapter.

        The logits travel as further columns of x, which the op's router picks out and A does not see.
        """
        logits = self.logits(x, current)
        columns = logits.shape[1] + -(x.shape[-1] + logits.shape[1]) % 8  # rows stay aligned
        further = pad(logits, (0, columns - logits.shape[1]))[:, None].expand(-1, x.shape[1], -1)
        R = pad(torch.eye(logits.shape[1], dtype=x.dtype, device=x.device), (x.shape[-1], columns - logits.shape[1]))
        A = pad(adapter.A, (0, columns))
        if options.get("A0") is not None:
            options["A0"] = pad(options["A0"], (0, columns))
        weight, bias = options.pop("weight", None), options.pop("bias", None)
        if weight is not None:
            options["base_out"] = linear(x, weight, bias)
        return routed_lora(torch.cat([x, further], -1), A, adapter.lora_B, R, adapter.scaling, **options)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_of_prompt": None}


def make(config: AlignLoraConfig, in_features: int, logits: int) -> LinearRouter | SequenceRouter:
    """The router that the options ask for."""
    return (LinearRouter if config.router == "linear" else SequenceRouter)(in_features, logits)


def _reset(weight: Tensor, *, zeros: bool) -> None:
    if zeros:
        nn.init.zeros_(weight)
    else:
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
