"""mk_mmd against the literal sum over pairs of tasks in plain PyTorch, as it is and compiled: value and gradient."""

from align_ext.bench.losses import ROW_MS, mk_mmd
from align_ext.bench.timing import Comparison, main, measure

# tasks, tokens of each, rounds, ranks
SIZES = {"cpu": (5, 400, 10, [8, 16, 64]), "cuda": (5, 400, 50, [8, 16, 64]), "quick": (3, 8, 2, [4])}


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    tasks, tokens, rounds, ranks = SIZES[size]
    return {
        f"mk_mmd, M={tasks}, {tokens} tokens each, r={rank}": measure(
            mk_mmd(tasks, tokens, rank, device, compiled=size != "quick"), rounds, device, row_ms=ROW_MS
        )
        for rank in ranks
    }


if __name__ == "__main__":
    main(run)
