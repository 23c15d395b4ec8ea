"""gaussian_kl against the literal sum over pairs of tasks in plain PyTorch: value and gradient."""

import torch
from timing import Comparison, main, measure, training_step

from align_ext import ops, reference

# tokens, rounds, (tasks, rank)
SIZES = {
    "cpu": (2048, 30, [(5, 8), (25, 8), (5, 64)]),
    "cuda": (8192, 50, [(5, 8), (25, 8), (5, 64)]),
    "quick": (64, 2, [(3, 8)]),
}


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    torch.manual_seed(0)
    results = {}
    tokens, rounds, cases = SIZES[size]
    for tasks, rank in cases:
        z, task = torch.randn(tokens, rank).to(device), (torch.arange(tokens) % tasks).to(device)
        results[f"gaussian_kl, M={tasks}, T={tokens}, r={rank}"] = measure(
            {
                "gaussian_kl": training_step(lambda z, t=task, m=tasks: ops.gaussian_kl(z, t, m), [z]),
                "pairs in plain PyTorch": training_step(lambda z, t=task, m=tasks: reference.gaussian_kl(z, t, m), [z]),
            },
            rounds,
            device,
        )
    return results


if __name__ == "__main__":
    main(run)
