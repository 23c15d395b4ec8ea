"""sibling_lora against one operator a layer: forward + backward of layers with the same x, their frozen bases and dx.

q, k and v of a model with grouped queries, gate and up of its MLP, as LoRA, as heads with masks on their latents
(M-LoRA) and with a router (R-LoRA, HydraLoRA); the last figure divides by the operators one by one.
"""

from typing import Any

import torch
from torch import Tensor

from align_ext.bench.timing import Comparison, main, measure
from align_ext.ops import dropout_sum, grouped_lora, routed_lora, sibling_lora

RANK, HEADS, P, SCALING = 8, 5, 0.1, 4.0
# tokens, rounds, (in, outs)
SIZES = {
    "cpu": ((256, 2048), 15, [(576, (576, 192, 192)), (576, (1536, 1536))]),
    "cuda": ((8192,), 50, [(576, (576, 192, 192)), (4096, (4096, 1024, 1024)), (4096, (11008, 11008))]),
    "quick": ((16,), 2, [(32, (48, 16))]),
}
KINDS: dict[str, tuple[Any, dict[str, str]]] = {
    "lora": (grouped_lora, {}),
    "m_lora": (dropout_sum, {"site": "latent"}),
    "r_lora": (routed_lora, {"site": "latent"}),
    "hydra": (routed_lora, {"site": "input"}),
}


def layers(
    kind: str, tokens: int, n: int, outs: tuple[int, ...], dtype: torch.dtype, device: str, rounds: int
) -> dict[str, Comparison]:
    """Both passes of layers with the same x."""
    operator, options = KINDS[kind]

    def normal(*shape: int, trained: bool = False) -> Tensor:
        return torch.randn(shape).to(device, dtype).requires_grad_(trained)

    x, offset, routed = normal(tokens, n, trained=True), kind in ("m_lora", "r_lora"), operator is routed_lora
    heads = () if kind == "lora" else (HEADS,)
    of_layers = {
        "A": [normal(RANK, n, trained=True) for _ in outs],
        "B": [normal(*heads, m, RANK, trained=True) for m in outs],
        "R": [normal(HEADS, n, trained=True) for _ in outs if routed],
        "A0": [normal(RANK, n) for _ in outs if offset],
        "B0": [normal(m, RANK) for m in outs if offset],
        "weight": [normal(m, n) for m in outs],
    }
    of_layers = {name: tensors for name, tensors in of_layers.items() if tensors}
    dy = [normal(tokens, m) for m in outs]

    def one_by_one() -> None:
        each = [{name: tensors[i] for name, tensors in of_layers.items()} for i in range(len(outs))]
        y = [operator(x, **own, scaling=SCALING, dropout_p=P, **options)[0] for own in each]
        torch.autograd.backward(y, dy)

    def together() -> None:
        y, *_ = sibling_lora(x, **of_layers, scaling=len(outs) * [SCALING], dropout_p=P, **options)
        torch.autograd.backward(y, dy)

    title = f"{kind}, {len(outs)} layers, {n} -> {outs}, {dtype}, T={tokens}, r={RANK}, p={P}"
    return {title: measure({"an operator a layer": one_by_one, "sibling_lora": together}, rounds, device)}


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    counts, rounds, shapes = SIZES[size]
    results: dict[str, Comparison] = {}
    for kind in KINDS:
        for n, outs in shapes:
            for dtype in (torch.float32, torch.bfloat16):
                for tokens in counts:
                    results |= layers(kind, tokens, n, outs, dtype, device, rounds)
    return results


if __name__ == "__main__":
    main(run)
