"""gaussian_kl against the literal sum over pairs of tasks in plain PyTorch: value and gradient."""

from collections.abc import Callable

import torch
from timing import main, measure
from torch import Tensor

from align_ext import ops, reference

TOKENS, ROUNDS = 2048, 30


def step(loss: Callable[[Tensor], Tensor], z: Tensor) -> Callable[[], None]:
    """One forward and backward."""
    leaf = z.detach().requires_grad_()

    def run() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return run


def run() -> dict[str, dict[str, list[float]]]:
    """Times by title and variant."""
    torch.manual_seed(0)
    results = {}
    for tasks, rank in ((5, 8), (25, 8), (5, 64)):
        z, task = torch.randn(TOKENS, rank), torch.arange(TOKENS) % tasks
        results[f"M={tasks}, T={TOKENS}, r={rank}"] = measure(
            {
                "gaussian_kl": step(lambda z, t=task, m=tasks: ops.gaussian_kl(z, t, m), z),
                "pairs in plain PyTorch": step(lambda z, t=task, m=tasks: reference.gaussian_kl(z, t, m), z),
            },
            ROUNDS,
        )
    return results


if __name__ == "__main__":
    main(run)
