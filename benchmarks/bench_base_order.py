"""grouped_lora with the frozen product before or after the low-rank term, which is CUDA's choice (base_order.h)."""

import torch

from align_ext import _C
from align_ext.bench.timing import Comparison, main, measure

RANK, P = 8, 0.1
SIZES = {  # tokens, rounds, (in, out)
    "cpu": (2048, 10, [(576, 1536)]),
    "cuda": (8192, 50, [(576, 1536), (2048, 5504), (3072, 8192), (8192, 3072), (4096, 4096)]),
    "quick": (16, 2, [(32, 48)]),
}


def orders(tokens: int, n: int, m: int, dtype: torch.dtype, device: str, rounds: int) -> Comparison:
    """Both passes in both orders."""
    sizes = [(tokens, n), (RANK, n), (m, RANK), (m, n), (tokens, m), (tokens, RANK)]
    x, A, B, W, dy, dz = (torch.randn(size).to(device, dtype) for size in sizes)
    dz, rng = dz.float(), torch.tensor([1, 2], device=device)
    native = torch.ops.align_ext

    def step(first: bool) -> None:
        before = _C.low_rank_first(first)
        _, z = native.grouped_lora(x, A, B, 4.0, None, None, P, rng, W, None, None)
        native.grouped_lora_backward(dy, dz, x, z, A, B, 4.0, None, None, P, rng, W, True)
        _C.low_rank_first(before)

    variants = {"the frozen product first": lambda: step(False), "the low-rank term first": lambda: step(True)}
    return measure(variants, rounds, device)


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title, of each width and dtype."""
    tokens, rounds, shapes = SIZES[size]
    return {
        f"{n} -> {m}, {dtype}, T={tokens}, r={RANK}, p={P}": orders(tokens, n, m, dtype, device, rounds)
        for n, m in shapes
        for dtype in (torch.float32, torch.bfloat16)
    }


if __name__ == "__main__":
    main(run)
