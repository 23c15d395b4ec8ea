"""gaussian_kl against the literal sum over pairs of tasks and its closed form in plain PyTorch: value and gradient."""

from align_ext.bench.losses import ROW_MS, gaussian_kl
from align_ext.bench.timing import Comparison, main, measure

# tokens, rounds, (tasks, rank)
SIZES = {
    "cpu": (2048, 30, [(5, 8), (25, 8), (5, 64)]),
    "cuda": (8192, 50, [(5, 8), (25, 8), (5, 64)]),
    "quick": (64, 2, [(3, 8)]),
}


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    tokens, rounds, cases = SIZES[size]
    return {
        f"gaussian_kl, M={tasks}, T={tokens}, r={rank}": measure(
            gaussian_kl(tokens, tasks, rank, device, compiled=size != "quick"), rounds, device, row_ms=ROW_MS
        )
        for tasks, rank in cases
    }


if __name__ == "__main__":
    main(run)
