"""The Gaussian KL alignment loss between tasks, its moments and its gradient tables.

Native side: csrc/ops/gaussian_kl.h. Oracle: align_ext/reference/gaussian_kl.py.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from align_ext.ops import _native  # noqa: F401
from align_ext.ops._autograd import below_autograd, differentiable
from align_ext.ops._checks import check_floating, check_integers, checked_integer


def gaussian_kl(
    z: Tensor,
    task: Tensor,
    num_tasks: int,
    *,
    eps: float = 1e-6,
    ddof: int | None = None,
    pairs: Literal["sum", "mean"] | None = None,
    statistics: Literal["token", "position"] = "token",
) -> Tensor:
    """Computes the symmetric KL divergence between the tasks' diagonal Gaussians, over all pairs of tasks.

    L = Σ_{i<j} ¼ Σ_d [v_i/v_j + v_j/v_i - 2 + (mu_i - mu_j)² (1/v_i + 1/v_j)],  v_i = var_i + eps
    (Align-LoRA, 2508.05078, eq. 5), evaluated in O(num_tasks * rank) by a closed form of non-negative terms.
    The gradient is affine in z: dz_t = a_i + b_i (z_t - mu_i), i = task[t]. Fewer than two tasks with at least
    max(2, 1 + ddof) tokens: loss 0, gradient 0.

    statistics="position" is what the code released with the paper computes: a Gaussian at each of the S positions,
    over the samples of a task, and the mean of the S losses, with padding counted like any token. That compares tasks
    by the positions of their tokens, needs unpacked batches, and grows without bound where all samples have the same
    prompt token (variance 0). Use it only to reproduce that code; eq. 5 is about the tokens of a task: "token".

    Args:
        z: [T, rank]; for "position" [B, S, rank]: B samples, one to a row of the batch, of S positions. float32,
            bfloat16 or float16 (float64 on the CPU). Statistics in float32 (float64).
        task: int64 [T], for "position" [B], in 0 .. num_tasks-1; any other value means that the token (or sample)
            does not count.
        num_tasks: the number of tasks, up to 2^16.
        eps: added to every variance.
        ddof: 0 for the population variance, 1 for the sample variance; None: 0 (the paper), for "position" 1 (the
            released code).
        pairs: "sum" over the pairs of tasks, or "mean"; None: "sum" (eq. 5), for "position" "mean" (the released code).
        statistics: "token", the tokens of a task are one population, or "position".

    Returns:
        The loss, a scalar of float32 (float64 for float64).

    Raises:
        ValueError: an option outside its range, or shapes that do not fit statistics="position".
        RuntimeError: shapes or dtypes that do not match; the message names the argument.
    """
    if statistics not in ("token", "position"):
        raise ValueError(f'statistics must be "token" or "position", got {statistics!r}')
    if pairs not in ("sum", "mean", None):
        raise ValueError(f'pairs must be "sum" or "mean", got {pairs!r}')
    if ddof not in (0, 1, None):
        raise ValueError(f"ddof must be 0 or 1, got {ddof}")
    num_tasks = checked_integer("num_tasks", num_tasks)
    released = statistics == "position"
    ddof = int(released) if ddof is None else ddof
    mean_pairs = released if pairs is None else pairs == "mean"
    if not released:
        return _gaussian_kl(z, task, num_tasks, eps, ddof, mean_pairs)[0]
    if z.dim() != 3 or task.shape != z.shape[:1]:
        raise ValueError(
            'statistics="position" needs z [B, S, rank] of an unpacked batch and task [B], one id a sample, got '
            f"z {list(z.shape)} and task {list(task.shape)}: z.view(B, S, rank) makes it of [B * S, rank]"
        )
    # One Gaussian of S * rank dimensions is S Gaussians of rank: the KL of diagonal ones sums over the dimensions.
    loss = _gaussian_kl(z.flatten(1), task, num_tasks, eps, ddof, mean_pairs)[0]
    return loss / max(z.shape[1], 1)


def task_moments(z: Tensor | Sequence[Tensor], task: Tensor, num_tasks: int, *, rank: int | None = None) -> Tensor:
    """Computes n | mean | M2 of z per task, M2 = Σ (z - mean)², for all layers in one deterministic pass.

    Any loss on these statistics uses ordinary autograd: dz_t = d_mean_i / n_i + 2 d_M2_i (z_t - mean_i), i = task[t],
    again in one pass, and 0 for tokens that do not count. n is a constant: a gradient of it is ignored.

    Args:
        z: [T, rank], or a list of the [T, rank] of several layers, whose ranks may differ; float32, bfloat16 or
            float16 (float64 on the CPU).
        task: int64 [T]; values outside 0 .. num_tasks-1 do not count.
        num_tasks: the number of tasks, up to 2^16.
        rank: the rank of the result; the default is the largest rank of a layer, and it may not be less.

    Returns:
        [num_tasks, 2 rank + 1], float32 (float64 for float64); zero for tasks without tokens and in the dimensions
        that a layer lacks. For a list [layers, num_tasks, 2 rank + 1].

    Raises:
        ValueError: num_tasks or rank outside its range.
        RuntimeError: shapes or dtypes that do not match; the message names the argument. Double backward.
    """
    if isinstance(z, Tensor):
        return task_moments([z], task, num_tasks, rank=rank)[0]
    num_tasks = checked_integer("num_tasks", num_tasks)
    rank = max([0, *(layer.shape[-1] for layer in z)]) if rank is None else checked_integer("rank", rank, 0, 2**30)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return _task_moments(list(z), task, num_tasks, rank)
    return below_autograd(_task_moments, (list(z), task, num_tasks, rank))


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
    return _tables(moments, eps, ddof, pairs == "mean")


def gaussian_kl_backward(
    d_loss: Tensor, z: Sequence[Tensor], task: Tensor, tables: Tensor, *, scale: float = 1.0
) -> list[Tensor]:
    """Computes dz_t = scale * d_loss * (a[task] + b[task] * (z_t - mu[task])) for all layers.

    Args:
        d_loss: one value, the gradient of the loss.
        z: the latents of each layer, [T, rank]; the ranks may differ.
        task: int64 [T].
        tables: [layers, tasks, 3 rank] from gaussian_kl_tables; rank is at least the largest rank of a layer.
        scale: an additional factor.

    Returns:
        dz of each layer, like its z; views of one buffer that do not overlap.
    """
    dz = _gradients(d_loss, scale, z, task, tables)
    return [torch.as_strided(dz, t.shape, (t.shape[1], 1), i * dz.shape[1]) for i, t in enumerate(z)]


def _acc(z: Tensor) -> torch.dtype:
    return torch.float64 if z.dtype == torch.float64 else torch.float32


@torch.library.register_fake("align_ext::task_moments")
def _(z: Sequence[Tensor], task: Tensor, num_tasks: int, rank: int) -> Tensor:
    check_floating(z=z[0])
    check_integers(task=task)
    return z[0].new_empty((len(z), num_tasks, 2 * rank + 1), dtype=_acc(z[0]))


@torch.library.register_fake("align_ext::gaussian_kl_tables")
def _(moments: Tensor, eps: float, ddof: int, mean_pairs: bool) -> tuple[Tensor, Tensor]:
    layers, tasks, width = moments.shape
    return moments.new_empty((layers,)), moments.new_empty((layers, tasks, width // 2 * 3))


@torch.library.register_fake("align_ext::gaussian_kl")
def _(z: Tensor, task: Tensor, num_tasks: int, eps: float, ddof: int, mean_pairs: bool) -> tuple[Tensor, Tensor]:
    check_floating(z=z)
    check_integers(task=task)
    return z.new_empty((), dtype=_acc(z)), z.new_empty((1, num_tasks, 3 * z.shape[1]), dtype=_acc(z))


@torch.library.register_fake("align_ext::gaussian_kl_backward")
def _(d_loss: Tensor, scale: float, z: Sequence[Tensor], task: Tensor, tables: Tensor) -> Tensor:
    size = z[0].shape[0] * (tables.shape[2] // 3)
    return z[0].new_empty((len(z), (size + 15) // 16 * 16))


def _refuse_double_backward(name: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(f"{name} cannot be differentiated twice: call backward without create_graph=True")


def _setup_moments(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    z, task, *_ = inputs
    ctx.save_for_backward(*z, task, output)


def _moments_backward(ctx: Any, d_moments: Tensor) -> tuple[list[Tensor] | None, ...]:
    _refuse_double_backward("task_moments")
    *z, task, moments = ctx.saved_tensors
    rank = moments.shape[-1] // 2
    n, mean, _ = moments.split([1, rank, rank], dim=-1)
    _, d_mean, d_m2 = d_moments.split([1, rank, rank], dim=-1)
    tables = torch.cat([d_mean / n.clamp_min(1), 2 * d_m2, mean], dim=-1)
    return gaussian_kl_backward(moments.new_ones(()), z, task, tables), None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    z, task, *_ = inputs
    ctx.save_for_backward(z, task, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # autograd makes no zeros for the tables


def _backward(ctx: Any, d_loss: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_loss is None:
        return (None,)
    _refuse_double_backward("gaussian_kl")
    z, task, tables = ctx.saved_tensors
    return (gaussian_kl_backward(d_loss, [z], task, tables)[0],)


torch.library.register_autograd("align_ext::task_moments", _moments_backward, setup_context=_setup_moments)
_task_moments = torch.ops.align_ext.task_moments.default
_tables = torch.ops.align_ext.gaussian_kl_tables.default
_gradients = torch.ops.align_ext.gaussian_kl_backward.default
_gaussian_kl = differentiable("gaussian_kl", _backward, _setup_context, ["z"])
