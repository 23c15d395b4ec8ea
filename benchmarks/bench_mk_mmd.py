"""mk_mmd against the literal sum over pairs of tasks in plain PyTorch, as it is and compiled: value and gradient."""

from functools import partial

import torch
from timing import Comparison, main, measure, training_step
from torch import Tensor

from align_ext import ops, reference

# tasks, tokens of each, rounds, ranks
SIZES = {
    "cpu": (5, 400, 10, [8, 16, 64]),
    "cuda": (5, 400, 50, [8, 16, 64]),
    "quick": (3, 8, 2, [4]),
}


def naive(z: Tensor, tasks: int) -> Tensor:
    """The reference without its indexing: z holds one task after the other, and all tokens take part."""
    bw = 2 * z.detach().var(0, correction=1).sum()
    groups = z.chunk(tasks)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        d2 = ((a[:, None] - b[None]) ** 2).sum(-1)
        return sum(torch.exp(-d2 / (bw * 2.0 ** (k - 2))) for k in range(5)).mean()

    within = [mean(g, g) for g in groups]
    pairs = [(i, j) for i in range(tasks) for j in range(i)]
    return sum(within[i] + within[j] - 2 * mean(groups[i], groups[j]) for i, j in pairs)


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    torch.manual_seed(0)
    results = {}
    tasks, tokens, rounds, ranks = SIZES[size]
    options = {"num_tasks": tasks, "n_max": tokens}
    for rank in ranks:
        z, task = torch.randn(tasks * tokens, rank).to(device), torch.arange(tasks).repeat_interleave(tokens).to(device)
        variants = {
            "mk_mmd": training_step(partial(ops.mk_mmd, task=task, **options), [z]),
            "pairs in plain PyTorch": training_step(partial(reference.mk_mmd, task=task, **options), [z]),
        }
        if size != "quick":
            variants["pairs, torch.compile"] = training_step(torch.compile(partial(naive, tasks=tasks)), [z])
        results[f"mk_mmd, M={tasks}, {tokens} tokens each, r={rank}"] = measure(variants, rounds, device)
    return results


if __name__ == "__main__":
    main(run)
