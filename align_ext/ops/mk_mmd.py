"""The multi-kernel MMD alignment loss between tasks.

Native side: csrc/ops/mk_mmd.h. Oracle: align_ext/reference/mk_mmd.py.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from align_ext.ops import _native  # noqa: F401
from align_ext.ops._autograd import below_autograd, differentiable
from align_ext.ops._checks import check_floating, check_integers, checked_integer

_MAX_KERNELS = 32  # kMaxMmdKernels


def mk_mmd(
    z: Tensor | Sequence[Tensor],
    task: Tensor,
    num_tasks: int,
    *,
    bandwidths: Literal["heuristic"] | Sequence[float] = "heuristic",
    num_kernels: int = 5,
    statistic: Literal["v", "u"] = "v",
    n_max: int = 256,
    pairs: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Computes the squared multi-kernel maximum mean discrepancy between the tasks' latents, over all pairs of tasks.

    L = Σ_{i<j} [mean k(i, i) + mean k(j, j) - 2 mean k(i, j)],  k(a, b) = Σ_k exp(-|z_a - z_b|² / bandwidth_k)
    (Gretton et al. 2012; DAN, 1502.02791; Align-LoRA, 2508.05078), the means over pairs of tokens. Value and gradient
    come from one pass over tiles of token pairs, in O(T rank) memory. A task with n > n_max tokens uses the tokens of
    index floor(j n / n_max), j = 0 .. n_max-1; the others get zero gradient. Tasks with fewer than two tokens are not
    used. With fewer than two tasks, or bw < 1e-12, loss and gradient are 0.

    Args:
        z: [T, rank], or a list of the [T, rank] of several layers, whose ranks may differ; float32, bfloat16 or
            float16 (float64 on the CPU). Arithmetic in float32 (float64).
        task: int64 [T], in 0 .. num_tasks-1; any other value means that the token does not count.
        num_tasks: the number of tasks, up to 2^16.
        bandwidths: "heuristic": bw 2^(k - num_kernels // 2), k = 0 .. num_kernels-1, bw the mean squared distance of
            two different tokens that are used, a constant for the gradient; or up to 32 positive numbers. Bandwidths
            whose ratios are powers of two share exponentials.
        num_kernels: the number of bandwidths of the heuristic, 1 to 32.
        statistic: "v": the means within a task include each token's pair with itself, L >= 0; "u": they do not, and
            the estimate is unbiased.
        n_max: the largest number of tokens of a task that are used, 2 or more. The time grows with its square.
        pairs: "sum" over the pairs of tasks, or "mean".

    Returns:
        The loss, a scalar of float32 (float64 for float64). For a list [layers].

    Raises:
        ValueError: an option outside its range.
        RuntimeError: shapes or dtypes that do not match; the message names the argument. Double backward.
    """
    layers = [z] if isinstance(z, Tensor) else list(z)
    options = _checked(num_tasks, bandwidths, num_kernels, statistic, n_max, pairs)
    losses: Tensor = _mk_mmd(layers, task, *options)[0]
    return losses[0] if isinstance(z, Tensor) else losses


def mk_mmd_rows(z: Sequence[Tensor], task: Tensor, num_tasks: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the loss of every layer, and its gradient in the tokens that take part; arguments as in mk_mmd.

    Returns:
        loss: [layers].
        gradient: [layers, rows, rank], rank the largest of a layer; rows of the tokens that take part, then zeros.
        slot: int32 [T], the row of a token in gradient, or -1.
    """
    return below_autograd(torch.ops.align_ext.mk_mmd.default, (list(z), task, *_checked(num_tasks, **options)))


def mk_mmd_backward(
    d_loss: Tensor, gradient: Tensor, slot: Tensor, ranks: Sequence[int], dtype: torch.dtype
) -> list[Tensor]:
    """Computes dz_t = d_loss * gradient[slot[t]], zero where slot is -1, for all layers.

    Args:
        d_loss: [layers], the gradient of each layer's loss.
        gradient: [layers, rows, rank] from mk_mmd_rows.
        slot: int32 [T], likewise, or a part of it.
        ranks: the rank of each layer.
        dtype: of dz.

    Returns:
        dz of each layer, [T, rank of the layer]; views of one tensor that do not overlap.
    """
    dz = below_autograd(torch.ops.align_ext.mk_mmd_backward.default, (d_loss, gradient, slot, dtype))
    return [of_layer[:, :rank] for of_layer, rank in zip(dz.unbind(0), ranks, strict=True)]


def _checked(
    num_tasks: int,
    bandwidths: str | Sequence[float] = "heuristic",
    num_kernels: int = 5,
    statistic: str = "v",
    n_max: int = 256,
    pairs: str = "sum",
) -> tuple[int, list[float], int, bool, int, bool]:
    """Returns the operator's arguments."""
    if pairs not in ("sum", "mean"):
        raise ValueError(f'pairs must be "sum" or "mean", got {pairs!r}')
    if statistic not in ("v", "u"):
        raise ValueError(f'statistic must be "v" or "u", got {statistic!r}')
    num_tasks = checked_integer("num_tasks", num_tasks)
    n_max = checked_integer("n_max", n_max, minimum=2, maximum=2**63 - 1)
    num_kernels = checked_integer("num_kernels", num_kernels, maximum=_MAX_KERNELS)
    return num_tasks, _parse_bandwidths(bandwidths), num_kernels, statistic == "u", n_max, pairs == "mean"


def _parse_bandwidths(bandwidths: str | Sequence[float]) -> list[float]:
    """Returns the given bandwidths, or an empty list for the heuristic."""
    if isinstance(bandwidths, str):
        if bandwidths != "heuristic":
            raise ValueError(f'bandwidths must be "heuristic" or numbers, got {bandwidths!r}')
        return []
    numbers = [float(bandwidth) for bandwidth in bandwidths]
    if not 1 <= len(numbers) <= _MAX_KERNELS or not all(0 < number < math.inf for number in numbers):
        raise ValueError(f"bandwidths must be 1 to {_MAX_KERNELS} positive numbers, got {bandwidths!r}")
    return numbers


def _acc(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("align_ext::mk_mmd")
def _(
    z: Sequence[Tensor],
    task: Tensor,
    num_tasks: int,
    bandwidths: Sequence[float],
    num_kernels: int,
    u_statistic: bool,
    n_max: int,
    mean_pairs: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    check_floating(z=z[0])
    check_integers(task=task)
    first, tokens = z[0], z[0].shape[0]
    rows = torch.sym_min(tokens, num_tasks * torch.sym_min(n_max, tokens))
    rank = functools.reduce(torch.sym_max, (layer.shape[1] for layer in z))
    loss, gradient = (first.new_empty(s, dtype=_acc(first.dtype)) for s in ((len(z),), (len(z), rows, rank)))
    return loss, gradient, first.new_empty((tokens,), dtype=torch.int32)


@torch.library.register_fake("align_ext::mk_mmd_backward")
def _(d_loss: Tensor, gradient: Tensor, slot: Tensor, dtype: torch.dtype) -> Tensor:
    return gradient.new_empty((gradient.shape[0], slot.shape[0], gradient.shape[2]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, gradient, slot = output
    ctx.save_for_backward(gradient, slot)
    ctx.mark_non_differentiable(gradient, slot)
    ctx.set_materialize_grads(False)  # autograd makes no zeros for these two
    ctx.ranks, ctx.dtype = [z.shape[1] for z in inputs[0]], inputs[0][0].dtype


def _backward(ctx: Any, d_loss: Tensor | None, *_: Tensor | None) -> Sequence[Tensor | None]:
    if d_loss is None:
        return [None] * len(ctx.ranks)
    if torch.is_grad_enabled():
        raise RuntimeError("mk_mmd cannot be differentiated twice: call backward without create_graph=True")
    gradient, slot = ctx.saved_tensors
    return mk_mmd_backward(d_loss, gradient, slot, ctx.ranks, ctx.dtype)


_mk_mmd = differentiable("mk_mmd", _backward, _setup_context, ["z"])
