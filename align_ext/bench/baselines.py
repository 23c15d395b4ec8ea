"""The baselines of the benchmark: several heads as a loop, the same restructured, and PEFT's LoRA layer.

Both classes compute, of x in a dtype that may be narrower than that of the adapters,

    y = base(x) + s Σ_i w_i B_i u_i,   w = softmax(R x), or 1 without a router,
    u_i = A (mask_i * x) (site "input") or mask_i * (A x) (site "latent");

site "input": LoRA (one head), HydraLoRA (2404.19245); "latent": R-LoRA (2502.15455), M-LoRA (2508.05078).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear, softmax

ALPHA = 32
Site = Literal["input", "latent"]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a measured adapter."""

    tokens: int = 2048
    rank: int = 8
    heads: int = 5
    dropout_p: float = 0.1

    def __str__(self) -> str:
        return f"T={self.tokens}, r={self.rank}, N={self.heads}, p={self.dropout_p:g}"


Make = Callable[[nn.Linear, Sizes, torch.dtype], nn.Module]


class Heads(nn.Module):
    """The parameters of N heads on one A, with or without a router."""

    def __init__(self, base: nn.Linear, sizes: Sizes, dtype: torch.dtype, *, site: Site, router: bool) -> None:
        super().__init__()
        n, m, r = base.in_features, base.out_features, sizes.rank
        self.base, self.sizes, self.site, self.scaling = base, sizes, site, ALPHA / r

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, device=base.weight.device).to(dtype) / n**0.5)

        self.lora_A, self.lora_B = random(r, n), random(sizes.heads, m, r)
        self.lora_R = random(sizes.heads, n) if router else None

    @property
    def dropout_p(self) -> float:
        """The dropout probability, 0 in eval mode."""
        return self.sizes.dropout_p if self.training else 0.0


class LoopedHeads(Heads):
    """Computes head after head, as the released codes do: each head is a product and an update of y, [T, m]."""

    def forward(self, x: Tensor) -> Tensor:
        """Computes y."""
        y, p = self.base(x), self.dropout_p
        x = x.to(self.lora_A.dtype)
        w = None if self.lora_R is None else softmax(linear(x, self.lora_R), -1)
        z = linear(x, self.lora_A) if self.site == "latent" else None
        for i, B in enumerate(self.lora_B):
            u = linear(dropout(x, p), self.lora_A) if z is None else dropout(z, p)
            head = self.scaling * linear(u, B)
            y += (head if w is None else w[..., i, None] * head).to(y.dtype)
        return y


class ConcatenatedHeads(Heads):
    """Computes the same in restructured plain PyTorch: one product for all heads, added in place, custom backward.

    With a router and site "input" all heads share one mask, since otherwise they would not be one product.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Computes y."""
        A, B, R = (None if t is None else t.to(x.dtype) for t in (self.lora_A, self.lora_B, self.lora_R))
        assert B is not None
        columns = B.transpose(0, 1).flatten(1)  # [m, N r]
        options = (self.scaling, self.dropout_p, self.site)
        y = _Concatenated.apply(x.flatten(0, -2), A, columns, R, self.base.weight, options)
        return y.unflatten(0, x.shape[:-1])


def _mask(like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like).bernoulli_(1 - p).div_(1 - p)


class _Concatenated(torch.autograd.Function):
    """Computes y = x Wᵀ + s U Bcatᵀ, U the concatenation of w_i mask_i z over the heads, [T, N r]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, A: Tensor, B: Tensor, R: Tensor | None, weight: Tensor, options: tuple[float, float, Site]
    ) -> Tensor:
        scaling, p, site = options
        heads = B.shape[1] // A.shape[0]
        xd, mask = x, None
        if site == "input":
            mask = _mask(x, p)
            xd = x * mask
        z = (xd @ A.T)[:, None]  # [T, 1, r]
        if site == "latent":
            mask = _mask(z.expand(-1, heads, -1), p)
            u = z * mask
        else:
            u = z.expand(-1, heads, -1)
        w = None if R is None else softmax(x @ R.T, -1)[..., None]
        U = (u if w is None else u * w).flatten(1)
        ctx.save_for_backward(x, xd, A, B, R, weight, mask, w, u, U)
        ctx.options = (scaling, site)
        return (x @ weight.T).addmm_(U, B.T, alpha=scaling)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, xd, A, B, R, weight, mask, w, u, U = ctx.saved_tensors
        scaling, site = ctx.options
        dU = scaling * (dy @ B).view_as(u)
        dB = scaling * (dy.T @ U)
        du = dU if w is None else dU * w
        dz = (du * mask if site == "latent" else du).sum(1)
        dx = dy @ weight
        if site == "input":
            dx += (dz @ A) * mask
        else:
            dx.addmm_(dz, A)
        dR = None
        if R is not None:
            dw = (dU * u).sum(-1, keepdim=True)
            d_logits = (w * (dw - (w * dw).sum(1, keepdim=True)))[..., 0]
            dx.addmm_(d_logits, R)
            dR = d_logits.T @ x
        return dx, dz.T @ xd, dB, dR, None, None


def peft_lora(base: nn.Linear, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
    """Returns PEFT's LoRA layer.

    Raises:
        ModuleNotFoundError: PEFT is not installed.
    """
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=sizes.rank, lora_alpha=ALPHA, lora_dropout=sizes.dropout_p, target_modules=["0"])
    model: Any = nn.Sequential(base)
    model.is_loaded_in_4bit = getattr(base.weight, "quant_state", None) is not None  # which PEFT asks for
    layer = inject_adapter_in_model(config, model)[0]
    layer.lora_A.to(dtype)
    layer.lora_B.to(dtype)
    return layer


def heads(kind: type[Heads], site: Site, *, router: bool) -> Make:
    """Returns a function that adds these heads to a frozen layer."""

    def make(base: nn.Linear, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
        return kind(base, sizes, dtype, site=site, router=router)

    return make


def one_head(kind: type[Heads]) -> Make:
    """Returns a function that adds LoRA: one head with a mask on x."""

    def make(base: nn.Linear, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
        return kind(base, replace(sizes, heads=1), dtype, site="input", router=False)

    return make


def compiled(make: Make) -> Make:
    """Returns a function that makes the same layer under torch.compile."""

    def make_compiled(base: nn.Linear, sizes: Sizes, dtype: torch.dtype) -> nn.Module:
        layer = make(base, sizes, dtype)
        layer.compile(dynamic=False)
        return layer

    return make_compiled


LORA: dict[str, Make] = {
    "plain PyTorch LoRA": one_head(LoopedHeads),
    "LoRA, restructured": one_head(ConcatenatedHeads),
    "PEFT's LoRA": peft_lora,
}
SEVERAL: dict[str, Make] = {
    "M-LoRA, loop": heads(LoopedHeads, "latent", router=False),
    "R-LoRA, loop": heads(LoopedHeads, "latent", router=True),
    "HydraLoRA, loop": heads(LoopedHeads, "input", router=True),
    "M-LoRA, restructured": heads(ConcatenatedHeads, "latent", router=False),
    "R-LoRA, restructured": heads(ConcatenatedHeads, "latent", router=True),
    "HydraLoRA, restructured": heads(ConcatenatedHeads, "input", router=True),
}
