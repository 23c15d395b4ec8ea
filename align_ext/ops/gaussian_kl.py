"""The Gaussian KL alignment loss between tasks, its moments and its gradient tables.

Native side: csrc/ops/gaussian_kl.h. Oracle: align_ext/reference/gaussian_kl.py.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from align_ext.ops import _native  # noqa: F401


def gaussian_kl(
    z: Tensor,
    task: Tensor,
    num_tasks: int,
    *,
    eps: float = 1e-6,
    ddof: int = 0,
    pairs: Literal["sum", "mean"] = "sum",
) -> Tensor:
    """Computes the symmetric KL divergence between the tasks' diagonal Gaussians, over all pairs of tasks.

    L = Σ_{i<j} ¼ Σ_d [v_i/v_j + v_j/v_i - 2 + (mu_i - mu_j)² (1/v_i + 1/v_j)],  v_i = var_i + eps
    (Align-LoRA, 2508.05078, eq. 5), evaluated in O(num_tasks * rank) by a closed form of non-negative terms.
    The gradient is affine in z: dz_t = a_i + b_i (z_t - mu_i), i = task[t]. Fewer than two tasks with at least
    max(2, 1 + ddof) tokens: loss 0, gradient 0.

    Args:
        z: [T, rank], float32, bfloat16 or float16 (float64 on the CPU). Statistics in float32 (float64).
        task: int64 [T], in 0 .. num_tasks-1; any other value means that the token does not count.
        num_tasks: how many tasks there are.
        eps: added to every variance.
        ddof: 0 for the population variance (the paper), 1 for the sample variance.
        pairs: "sum" over the pairs of tasks (eq. 5), or "mean".

    Returns:
        The loss, a scalar of float32 (float64 for float64).

    Raises:
        ValueError: an option outside its range.
        RuntimeError: shapes or dtypes that do not match; the message names the argument.
    """
    if pairs not in ("sum", "mean"):
        raise ValueError(f'pairs must be "sum" or "mean", got {pairs!r}')
    if ddof not in (0, 1):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    return torch.ops.align_ext.gaussian_kl(z, task, num_tasks, eps, ddof, pairs == "mean")[0]


def task_moments(z: Tensor | Sequence[Tensor], task: Tensor, num_tasks: int, *, rank: int | None = None) -> Tensor:
    """Computes n | mean | M2 of z per task, M2 = Σ (z - mean)², in one deterministic pass; not differentiable.

    Args:
        z: [T, rank], or a list of the [T, rank] of several layers, whose ranks may differ.
        task: int64 [T]; values outside 0 .. num_tasks-1 do not count.
        num_tasks: how many tasks there are.
        rank: of the result, at least the widest layer's, which is the default.

    Returns:
        [num_tasks, 2 rank + 1], float32 (float64 for float64); zero for tasks without tokens and in the dimensions
        that a layer lacks. For a list [layers, num_tasks, 2 rank + 1].
    """
    if isinstance(z, Tensor):
        return task_moments([z], task, num_tasks, rank=rank)[0]
    rank = max((layer.shape[-1] for layer in z), default=0) if rank is None else rank
    return torch.ops.align_ext.task_moments([layer.detach() for layer in z], task, num_tasks, rank)


def gaussian_kl_tables(
    moments: Tensor, *, eps: float = 1e-6, ddof: int = 0, pairs: Literal["sum", "mean"] = "sum"
) -> tuple[Tensor, Tensor]:
    """Computes the KL loss of every layer from its moments, and the tables a | b | mu of its gradient in z.

    Args:
        moments: [layers, tasks, 2 rank + 1] = n | mean | M2.
        eps: as in gaussian_kl.
        ddof: as in gaussian_kl.
        pairs: as in gaussian_kl.

    Returns:
        loss: [layers].
        tables: [layers, tasks, 3 rank] = a | b | mu, so that dL/dz_t = a[task] + b[task] * (z_t - mu[task]).
    """
    return torch.ops.align_ext.gaussian_kl_tables(moments, eps, ddof, pairs == "mean")


def gaussian_kl_backward(
    d_loss: Tensor, z: Sequence[Tensor], task: Tensor, tables: Tensor, *, scale: float = 1.0
) -> list[Tensor]:
    """Computes dz_t = scale * d_loss * (a[task] + b[task] * (z_t - mu[task])) of all layers.

    Args:
        d_loss: one value, the gradient that came in.
        z: the layers' latents, [T, rank] each; the ranks may differ.
        task: int64 [T].
        tables: [layers, tasks, 3 rank] of gaussian_kl_tables; rank is at least the widest layer's.
        scale: a further factor.

    Returns:
        dz of each layer, like its z; parts of one buffer that do not overlap.
    """
    dz = torch.ops.align_ext.gaussian_kl_backward(d_loss, scale, z, task, tables)
    return [torch.as_strided(dz, t.shape, (t.shape[1], 1), i * dz.shape[1]) for i, t in enumerate(z)]


def _acc(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@torch.library.register_fake("align_ext::task_moments")
def _(z: Sequence[Tensor], task: Tensor, num_tasks: int, rank: int) -> Tensor:
    return z[0].new_empty((len(z), num_tasks, 2 * rank + 1), dtype=_acc(z[0]))


@torch.library.register_fake("align_ext::gaussian_kl_tables")
def _(moments: Tensor, eps: float, ddof: int, mean_pairs: bool) -> tuple[Tensor, Tensor]:
    layers, tasks, width = moments.shape
    return moments.new_empty((layers,)), moments.new_empty((layers, tasks, width // 2 * 3))


@torch.library.register_fake("align_ext::gaussian_kl")
def _(z: Tensor, task: Tensor, num_tasks: int, eps: float, ddof: int, mean_pairs: bool) -> tuple[Tensor, Tensor]:
    return z.new_empty((), dtype=_acc(z)), z.new_empty((num_tasks, 3 * z.shape[1]), dtype=_acc(z))


@torch.library.register_fake("align_ext::gaussian_kl_backward")
def _(d_loss: Tensor, scale: float, z: Sequence[Tensor], task: Tensor, tables: Tensor) -> Tensor:
    size = z[0].shape[0] * (tables.shape[2] // 3)
    return z[0].new_empty((len(z), (size + 15) // 16 * 16))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, task, *_ = inputs
    ctx.save_for_backward(z, task, output[1])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, d_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("gaussian_kl cannot be differentiated twice: call backward without create_graph=True")
    z, task, tables = ctx.saved_tensors
    return gaussian_kl_backward(d_loss, [z], task, tables[None])[0], None, None, None, None, None


torch.library.register_autograd("align_ext::gaussian_kl", _backward, setup_context=_setup_context)
