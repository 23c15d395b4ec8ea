"""sibling_lora against one operator a layer: forward + backward of layers with the same x, their frozen bases and dx.

q, k and v of a model with grouped queries, gate and up of its MLP; the last figure divides by the operators one by one.
"""

import torch
from torch import Tensor

from align_ext.bench.timing import Comparison, main, measure
from align_ext.ops import grouped_lora, sibling_lora

RANK, P, SCALING = 8, 0.1, 4.0
# tokens, rounds, (in, outs)
SIZES = {
    "cpu": (2048, 15, [(576, (576, 192, 192)), (576, (1536, 1536))]),
    "cuda": (8192, 50, [(576, (576, 192, 192)), (4096, (4096, 1024, 1024)), (4096, (11008, 11008))]),
    "quick": (16, 2, [(32, (48, 16))]),
}


def layers(
    tokens: int, n: int, outs: tuple[int, ...], dtype: torch.dtype, device: str, rounds: int
) -> dict[str, Comparison]:
    """Both passes of layers with the same x."""

    def normal(*shape: int, trained: bool = False) -> Tensor:
        return torch.randn(shape).to(device, dtype).requires_grad_(trained)

    x = normal(tokens, n, trained=True)
    A = [normal(RANK, n, trained=True) for _ in outs]
    B = [normal(m, RANK, trained=True) for m in outs]
    weight, dy = [normal(m, n) for m in outs], [normal(tokens, m) for m in outs]

    def one_by_one() -> None:
        y = [grouped_lora(x, a, b, SCALING, dropout_p=P, weight=w)[0] for a, b, w in zip(A, B, weight, strict=True)]
        torch.autograd.backward(y, dy)

    def together() -> None:
        y, _ = sibling_lora(x, A, B, len(outs) * [SCALING], dropout_p=P, weight=weight)
        torch.autograd.backward(y, dy)

    title = f"{len(outs)} layers, {n} -> {outs}, {dtype}, T={tokens}, r={RANK}, p={P}"
    return {title: measure({"an operator a layer": one_by_one, "sibling_lora": together}, rounds, device)}


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    tokens, rounds, shapes = SIZES[size]
    results: dict[str, Comparison] = {}
    for n, outs in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            results |= layers(tokens, n, outs, dtype, device, rounds)
    return results


if __name__ == "__main__":
    main(run)
