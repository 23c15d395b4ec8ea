"""Shared code of the projection operators: common arguments, and the common part of their autograd formulas."""

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from align_ext.ops._checks import check_floating, check_like_x

Weight = Tensor | Callable[[], Tensor] | None
Site = Literal["none", "input", "latent", "input_per_head"]
SITES = ("none", "input", "latent", "input_per_head")  # csrc/ops/heads.h: DropoutSite


def dropout_rng(device: torch.device) -> Tensor:
    """Draws (seed, offset) of a dropout mask, int64 [2], from the device's torch generator.

    So the RNG state that activation checkpointing or a resumed run restores reproduces the same masks.
    """
    return torch.randint(2**63 - 1, (2,), device=device)


def checked_rng(
    x: Tensor, dropout_p: float, rng: Tensor | None, weight: Weight, bias: Tensor | None, base_out: Tensor | None
) -> Tensor | None:
    """Checks the arguments that every projection has, and draws the mask's seed and offset if dropout needs them."""
    if (weight is None) == (base_out is None):
        raise ValueError("give exactly one of weight (a frozen linear) and base_out (what the base returned)")
    for part in (weight, bias) if base_out is None else ():
        if isinstance(part, Tensor) and part.requires_grad:
            raise ValueError("weight and bias must be frozen (requires_grad=False); for a trained base, give base_out")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    return dropout_rng(x.device) if dropout_p > 0 and rng is None else rng


def checked_site(site: str, dropout_p: float, A0: Tensor | None, B0: Tensor | None) -> int:
    """Checks the options of operators with several heads; returns the number of the dropout site in the kernels."""
    if site not in SITES:
        raise ValueError(f"site must be one of {', '.join(SITES)}, got {site!r}")
    if site == "none" and dropout_p > 0:
        raise ValueError(f'site "none" has no dropout: dropout_p must be 0, got {dropout_p}')
    if (A0 is None) != (B0 is None):
        raise ValueError("give both A0 and B0, or neither")
    for name, tensor in {"A0": A0, "B0": B0}.items():
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"{name} must be frozen (requires_grad=False)")
    return SITES.index(site)


def latent_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype of z and w: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def empty_outputs(
    x: Tensor, B: Tensor, latent: tuple[Any, ...], base: dict[str, Tensor | None], **adapters: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Makes y and z [T, *latent] for the fake kernels; checks devices and dtypes of all tensors."""
    check_floating(x=x, B=B, **adapters)
    check_like_x(x, **base)
    for name, tensor in {"B": B, **adapters, **base}.items():
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{name} is on {tensor.device}, but x is on {x.device}: they must be on one device")
    z = x.new_empty((math.prod(x.shape[:-1]), *latent), dtype=latent_dtype(x))
    return x.new_empty((*x.shape[:-1], B.shape[-2])), z


def empty_gradients(x: Tensor, need_dx: bool, *adapters: Tensor) -> tuple[Tensor, ...]:
    """Makes dx and the gradients of adapters for the fake kernels of backward operators."""
    dx = x.new_empty(x.shape if need_dx else (0,))
    return dx, *(adapter.new_empty(adapter.shape, dtype=latent_dtype(x)) for adapter in adapters)


def latent_shape(A: Tensor, B: Tensor, site: int) -> tuple[Any, ...]:
    """Returns the shape of one row of z with several heads: [r] or [N, r]."""
    return tuple(B.shape[::2]) if A.dim() == 3 or SITES[site] == "input_per_head" else (A.shape[-2],)


def keep_weight(ctx: Any, weight: Weight) -> Tensor | None:
    """Returns the weight that is saved for backward; of one that a function makes the function is kept instead."""
    ctx.make_weight = weight if callable(weight) else None
    return None if callable(weight) else weight


def weight_again(ctx: Any, saved: Tensor | None) -> Tensor | None:
    """Returns the weight in backward."""
    return saved if ctx.make_weight is None else ctx.make_weight()


def output_gradient(name: str, dy: Tensor | None, x: Tensor, B: Tensor) -> Tensor:
    """Returns dy, or zeros if the loss does not depend on y; refuses double differentiation."""
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} cannot be differentiated twice: call backward without create_graph=True")
    return x.new_zeros((*x.shape[:-1], B.shape[-2])) if dy is None else dy


def gradients(ctx: Any, grads: tuple[Tensor, ...], d_base_out: Tensor | None) -> tuple[Tensor | None, ...]:
    """Returns the gradients of the arguments: dx, the adapters' gradients, and that of base_out.

    Args:
        ctx: the autograd context.
        grads: dx, then one gradient for each adapter, which autograd converts to the adapter's dtype.
        d_base_out: the gradient of y, or None if there is no base_out.
    """
    dx, *d_adapters = grads
    return dx if ctx.needs_input_grad[0] else None, *d_adapters, d_base_out
