"""grouped_lora against the frozen layer alone, LoRA in plain PyTorch and PEFT's layer, and against a copy.

Three kinds of table: forward + backward of one adapted layer, its frozen base and dx included, divided by the frozen
layer alone; the low-rank part alone, divided by a copy of as many bytes as it has to move (csrc/ops/grouped_lora.h);
and what a call costs that has next to nothing to compute.
"""

from dataclasses import replace

import torch
from torch import Tensor

from align_ext.bench import layers
from align_ext.bench.baselines import LORA, Sizes
from align_ext.bench.timing import Comparison, main, measure

RANK, P = 8, 0.1
PLAIN = {name: LORA[name] for name in ("plain PyTorch LoRA", "PEFT's LoRA")}
LAYERS = PLAIN | {"grouped_lora": layers.ours(layers.SINGLE["lora"])}
# tokens, rounds, (in, out)
SIZES = {
    "cpu": (2048, 15, [(576, 1536), (2048, 5504)]),
    "cuda": (8192, 50, [(576, 1536), (2048, 5504), (4096, 11008)]),
    "quick": (16, 2, [(32, 48)]),
}


def low_rank(tokens: int, n: int, m: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Comparison]:
    """Both passes of the low-rank part, each against a copy of the bytes that it moves."""
    sizes = [(tokens, n), (RANK, n), (m, RANK), (tokens, m), (tokens, m), (tokens, RANK)]
    x, A, B, base, dy, dz = (torch.randn(size).to(device, dtype) for size in sizes)
    dz, rng = dz.float(), torch.tensor([1, 2], device=device)
    native = torch.ops.align_ext

    def forward() -> tuple[Tensor, Tensor]:
        return native.grouped_lora(x, A, B, 4.0, None, None, P, rng, None, None, base)

    _, z = forward()
    passes = {
        "forward": (forward, [x, base, base, z]),  # x + 2y + z
        "backward": (
            lambda: native.grouped_lora_backward(dy, dz, x, z, A, B, 4.0, None, None, P, rng, None, True),
            [dy, x, x, z, dz],  # g + x + dx + z + dz
        ),
    }
    results = {}
    for name, (call, moved) in passes.items():
        total = sum(t.numel() * t.element_size() for t in moved)
        source, target = (torch.zeros(total // 2, dtype=torch.uint8, device=device) for _ in range(2))
        variants = {"copy of as many bytes": lambda t=target, s=source: t.copy_(s), f"low-rank {name}": call}
        title = f"low-rank {name} alone, {n} -> {m}, {dtype}, T={tokens}, r={RANK}, p={P}: {total / 1e6:.1f} MB"
        results[title] = replace(measure(variants, rounds, device), bytes_moved=total)
    return results


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    tokens, rounds, shapes = SIZES[size]
    sizes, results = Sizes(tokens, RANK, 1, P), {}
    for n, m in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            mixed = {name + layers.FLOAT32: make for name, make in LAYERS.items()}
            makes = LAYERS | (mixed if dtype != torch.float32 else {})
            title = f"layer, forward + backward, {n} -> {m}, {dtype}, {sizes}"
            results[title] = measure(layers.variants(makes, sizes, (n, m), dtype, device), rounds, device)
            results |= low_rank(tokens, n, m, dtype, device, rounds)
    tiny = layers.variants(LAYERS, replace(sizes, tokens=4), (16, 16), torch.float32, device)
    results["calling a layer, forward + backward, 16 -> 16, T=4"] = measure(tiny, 20 * rounds, device, host=True)
    return results


if __name__ == "__main__":
    main(run)
