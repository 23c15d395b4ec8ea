"""The oracle of align_ext/ops/gaussian_kl.py: the literal sum over pairs of tasks, differentiated by autograd."""

import itertools

import torch
from torch import Tensor


def gaussian_kl(
    z: Tensor, task: Tensor, num_tasks: int, *, eps: float = 1e-6, ddof: int = 0, pairs: str = "sum"
) -> Tensor:
    """Computes Σ_{i<j} ½ [KL(N_i || N_j) + KL(N_j || N_i)] over the tasks with at least max(2, 1 + ddof) tokens."""
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


def task_moments(z: Tensor, task: Tensor, num_tasks: int) -> Tensor:
    """Computes n | mean | M2 of z per task."""
    z = z.to(torch.promote_types(z.dtype, torch.float32))
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
