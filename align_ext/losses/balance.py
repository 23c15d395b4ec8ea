"""The balance loss: routing must use every head (mtLoRA, 2603.01526; Switch Transformer, 2101.03961)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from align_ext.losses.tokens import Latents, TokenTasks, gather


@dataclass(frozen=True)
class Balance:
    """The balance loss of all routed layers, and its gradient.

        P_i = mean over the valid tokens t and groups g of w[t, g, i]
        "cv2":     L = var(P) / (mean(P)² + 1e-10), var with ddof 1, 0 for one head
        "switch":  L = N Σ_i f_i P_i, f_i the fraction of (token, group) pairs with i in their top-k, without gradient
        value = mean of L over the layers

    Since L depends on w only through P, its gradient is one number for each head.

    Attributes:
        value: scalar.
        per_layer: [layers], the loss of each layer, in order.
        d_w: for each layer, [N]: d value / d w[t, g, i] of every valid token.
    """

    value: Tensor
    per_layer: Tensor
    d_w: dict[int, Tensor]

    @classmethod
    def of(
        cls, weights: Latents, tokens: TokenTasks, kind: str, *, distributed: bool, top_k: int | None = None
    ) -> Balance:
        """Evaluates the routing weights w [T, G, N] of the layers, by layer, over all processes.

        Args:
            weights: w by layer.
            tokens: the tokens that count.
            kind: "cv2" or "switch".
            distributed: whether several processes train.
            top_k: how many heads a token takes, where w says of all how likely they are; None: those with w > 0.
        """
        first = next(iter(weights.values()))
        sums = torch.stack(
            [_sums(w, tokens.of(layer), top_k).to(first) for layer, w in sorted(weights.items())]
        )  # [layers, 2 N + 1]
        if distributed:
            sums = torch.stack(gather(sums)).sum(0)
        heads = first.shape[-1]
        count, total, chosen = sums.split([1, heads, heads], dim=1)
        count = count.clamp_min(1)
        per_layer, d_P = (_cv2 if kind == "cv2" else _switch)(total / count, chosen / count)
        d_w = d_P / (count * len(sums))
        layers = sorted(weights)
        return cls(per_layer.mean(), per_layer, {layer: d_w[i].to(weights[layer]) for i, layer in enumerate(layers)})

    def gradients(self, weights: Latents, tokens: TokenTasks, d_value: Tensor, scale: float) -> Latents:
        """Computes scale * d_value * d value / d w of the tokens of this process."""
        return {
            layer: _valid(w, tokens.of(layer))[:, None, None]
            * (self.d_w[layer] * (d_value.to(w) * scale)).expand(w.shape)
            for layer, w in weights.items()
        }


def _valid(w: Tensor, tokens: TokenTasks) -> Tensor:
    return (tokens.expand(w.device, len(w)) >= 0).to(w.dtype)


def _sums(w: Tensor, tokens: TokenTasks, top_k: int | None) -> Tensor:
    """Sums over this process's valid tokens, [2 N + 1]: (token, group) pairs | w by head | how often chosen by head."""
    valid = _valid(w, tokens)
    taken = w > 0 if top_k is None else torch.zeros_like(w).scatter_(-1, w.topk(top_k).indices, 1)
    total, chosen = (torch.einsum("t,tgi->i", valid, x) for x in (w, taken.to(w.dtype)))
    return torch.cat([valid.sum()[None] * w.shape[1], total, chosen])


def _cv2(P: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Returns L and dL/dP_i = 2 (P_i - mu) / ((N-1) D) - 2 var mu / (N D²) of each layer; D = mu² + 1e-10."""
    heads = P.shape[1]
    if heads == 1:
        return torch.zeros_like(P[:, 0]), torch.zeros_like(P)
    mu, var = P.mean(1, keepdim=True), P.var(1, correction=1, keepdim=True)
    D = mu * mu + 1e-10
    return (var / D)[:, 0], 2 * (P - mu) / ((heads - 1) * D) - 2 * var * mu / (heads * D * D)


def _switch(P: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Returns L = N Σ f_i P_i and dL/dP_i = N f_i of each layer."""
    heads = P.shape[1]
    return heads * (f * P).sum(1), heads * f
