"""The oracle of align_ext/ops/mk_mmd.py: the literal sum over pairs of tasks, differentiated by autograd."""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mk_mmd(
    z: Tensor | Sequence[Tensor],
    task: Tensor,
    num_tasks: int,
    *,
    bandwidths: str | Sequence[float] = "heuristic",
    num_kernels: int = 5,
    statistic: str = "v",
    n_max: int = 256,
    pairs: str = "sum",
) -> Tensor:
    """Computes Σ_{i<j} [mean k(i, i) + mean k(j, j) - 2 mean k(i, j)] over the tasks with at least two tokens."""
    if not isinstance(z, Tensor):
        options: dict[str, Any] = {"bandwidths": bandwidths, "num_kernels": num_kernels}
        options |= {"statistic": statistic, "n_max": n_max, "pairs": pairs}
        return torch.stack([mk_mmd(layer, task, num_tasks, **options) for layer in z])
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    groups = [_chosen(z[task == i], n_max) for i in range(num_tasks)]
    groups = [g for g in groups if len(g) >= 2]
    if len(groups) < 2:
        return z.sum() * 0
    if isinstance(bandwidths, str):
        # mean_{a != b} |z_a - z_b|² = 2 Σ |z - mean|² / (n - 1)
        bw = 2 * torch.cat(groups).detach().var(0, correction=1).sum().item()
        if bw < 1e-12:
            return z.sum() * 0
        betas = [1 / (bw * 2.0 ** (k - num_kernels // 2)) for k in range(num_kernels)]
    else:
        betas = [1 / bandwidth for bandwidth in bandwidths]

    def k(a: Tensor, b: Tensor) -> Tensor:
        d2 = ((a[:, None] - b[None]) ** 2).sum(-1)
        return torch.stack([torch.exp(-beta * d2) for beta in betas]).sum(0)

    def mean_within(g: Tensor) -> Tensor:
        n = len(g)
        if statistic == "v":
            return k(g, g).mean()
        return (k(g, g) * (1 - torch.eye(n, dtype=g.dtype))).sum() / (n * (n - 1))

    within = [mean_within(g) for g in groups]
    losses = [
        within[i] + within[j] - 2 * k(groups[i], groups[j]).mean()
        for i, j in itertools.combinations(range(len(groups)), 2)
    ]
    return torch.stack(losses).mean() if pairs == "mean" else torch.stack(losses).sum()


def _chosen(g: Tensor, n_max: int) -> Tensor:
    return g[[j * len(g) // n_max for j in range(n_max)]] if len(g) > n_max else g
