"""The oracle of align_ext/ops/gaussian_kl.py: the literal sum over pairs of tasks, differentiated by autograd."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad


def gaussian_kl(
    z: Tensor,
    task: Tensor,
    num_tasks: int,
    *,
    eps: float = 1e-6,
    ddof: int | None = None,
    pairs: str | None = None,
    statistics: str = "token",
) -> Tensor:
    """Computes Σ_{i<j} ½ [KL(N_i || N_j) + KL(N_j || N_i)] over the tasks with at least max(2, 1 + ddof) tokens."""
    if statistics == "position":  # as in the released code: the mean over the positions of the loss at each position
        ddof, pairs = 1 if ddof is None else ddof, pairs or "mean"
        each = [gaussian_kl(at, task, num_tasks, eps=eps, ddof=ddof, pairs=pairs) for at in z.unbind(1)]
        return torch.stack(each).mean()
    ddof, pairs = ddof or 0, pairs or "sum"
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    groups = [z[task == i] for i in range(num_tasks)]
    groups = [g for g in groups if len(g) >= max(2, 1 + ddof)]
    stats = [(g.mean(0), g.var(0, correction=ddof) + eps) for g in groups]
    losses = [
        0.25 * (vi / vj + vj / vi - 2 + (mi - mj) ** 2 * (1 / vi + 1 / vj)).sum()
        for (mi, vi), (mj, vj) in itertools.combinations(stats, 2)
    ]
    if not losses:
        return z.sum() * 0
    return torch.stack(losses).mean() if pairs == "mean" else torch.stack(losses).sum()


def task_moments(z: Tensor | Sequence[Tensor], task: Tensor, num_tasks: int, *, rank: int | None = None) -> Tensor:
    """Computes n | mean | M2 of z per task."""
    if not isinstance(z, Tensor):
        rank = max(layer.shape[-1] for layer in z) if rank is None else rank
        return torch.stack([task_moments(layer, task, num_tasks, rank=rank) for layer in z])
    z = pad(z.to(torch.promote_types(z.dtype, torch.float32)), (0, 0 if rank is None else rank - z.shape[-1]))
    rows = []
    for i in range(num_tasks):
        g = z[task == i]
        mean = g.sum(0) / max(len(g), 1)
        rows.append(torch.cat([z.new_tensor([len(g)]), mean, ((g - mean) ** 2).sum(0)]))
    return torch.stack(rows)


def gaussian_kl_tables(
    moments: Tensor, *, eps: float = 1e-6, ddof: int = 0, pairs: str = "sum"
) -> tuple[Tensor, Tensor]:
    """Computes the loss of each layer from its moments and, by autograd, a | b | mu: dL/dz_t = a + b (z_t - mu)."""
    rank = moments.shape[-1] // 2
    n, mean, m2 = moments.detach().split([1, rank, rank], dim=-1)
    mean, var = mean.clone().requires_grad_(), (m2 / (n - ddof).clamp_min(1)).requires_grad_()
    losses = []
    for layer in range(len(moments)):
        active = [i for i in range(moments.shape[1]) if n[layer, i] >= max(2, 1 + ddof)]
        terms = [mean.sum() * 0 + var.sum() * 0]
        for i, j in itertools.combinations(active, 2):
            vi, vj = var[layer, i] + eps, var[layer, j] + eps
            gap = (mean[layer, i] - mean[layer, j]) ** 2
            terms.append(0.25 * (vi / vj + vj / vi - 2 + gap * (1 / vi + 1 / vj)).sum())
        count = len(terms) - 1 if pairs == "mean" else 1
        losses.append(torch.stack(terms).sum() / max(count, 1))
    loss = torch.stack(losses)
    d_mean, d_var = torch.autograd.grad(loss.sum(), (mean, var))
    a, b = d_mean / n.clamp_min(1), 2 * d_var / (n - ddof).clamp_min(1)
    return loss.detach(), torch.cat([a, b, mean.detach()], dim=-1)
