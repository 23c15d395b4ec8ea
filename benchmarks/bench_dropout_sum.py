"""dropout_sum against the frozen layer alone and the same heads in plain PyTorch: forward + backward, base included."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from align_ext.bench.timing import Comparison, main, measure, training_step
from align_ext.ops import dropout_sum

RANK, HEADS, SCALING, P = 8, 4, 4.0, 0.1
SIZES = {  # tokens, rounds, (in, out)
    "cpu": (2048, 10, [(576, 1536), (2048, 5504)]),
    "cuda": (8192, 50, [(576, 1536), (2048, 5504), (4096, 11008)]),
    "quick": (16, 2, [(32, 48)]),
}
SITES = {"cpu": ("latent", "input_per_head"), "cuda": ("latent",)}


def plain(x: Tensor, A: Tensor, B: Tensor, weight: Tensor, site: str) -> Tensor:
    """The formula as its papers' code has it, one head after the other."""
    y, z = linear(x, weight), linear(x, A)
    for head in B:
        u = dropout(z, P) if site == "latent" else linear(dropout(x, P), A)
        y = y + SCALING * linear(u, head)
    return y


def variants(tokens: int, n: int, m: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], None]]:
    """The frozen layer alone, then both implementations of each site."""
    sizes = [(tokens, n), (RANK, n), (HEADS, m, RANK), (m, n), (tokens, m)]
    x, A, B, weight, dy = (torch.randn(size).to(device, dtype) for size in sizes)
    result = {"frozen layer alone": training_step(lambda x: linear(x, weight), [x], dy)}
    for site in SITES[device]:
        options = {"site": site, "dropout_p": P, "weight": weight}
        calls = {
            "plain PyTorch": lambda x, A, B, s=site: plain(x, A, B, weight, s),
            "dropout_sum": lambda x, A, B, o=options: dropout_sum(x, A, B, SCALING, **o)[0],
        }
        result |= {f"{name}, {site}": training_step(call, [x, A, B], dy) for name, call in calls.items()}
    return result


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title, of each width and dtype."""
    torch.manual_seed(0)
    tokens, rounds, shapes = SIZES[size]
    return {
        f"forward + backward, {n} -> {m}, {dtype}, T={tokens}, r={RANK}, N={HEADS}, p={P}": measure(
            variants(tokens, n, m, dtype, device), rounds, device
        )
        for n, m in shapes
        for dtype in (torch.float32, torch.bfloat16)
    }


if __name__ == "__main__":
    main(run)
