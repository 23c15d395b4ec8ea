"""What adapters add to a frozen layer in bfloat16, forward and backward, dx included: ours, and others' of one kind.

python benchmarks/bench_adapter_tax.py loop       the released codes' style, head after head [default]
python benchmarks/bench_adapter_tax.py peft       PEFT's LoRA layer
python benchmarks/bench_adapter_tax.py unsloth    Unsloth's fused LoRA of one projection, which has no dropout
"""

import sys
from functools import partial

import torch
from torch import Tensor, nn

from align_ext.bench import layers
from align_ext.bench.baselines import ALPHA, LORA, SEVERAL, Make, Sizes
from align_ext.bench.timing import Comparison, main, measure

SIZES = {  # tokens, rounds, (in, out)
    "cpu": (2048, 10, [(576, 1536), (2048, 5504)]),
    "cuda": (8192, 50, [(3072, 8192), (8192, 3072), (4096, 4096)]),
    "quick": (16, 2, [(32, 48)]),
}
SINGLE = {name: layers.ours(options) for name, options in layers.SINGLE.items()}
HEADS = {name: layers.ours(layers.HEADS[name]) for name in ("m_lora", "r_lora", "hydra, input_per_head")}


class UnslothLora(nn.Module):
    """Unsloth's autograd function, with parameters of its own."""

    def __init__(self, base: nn.Linear, sizes: Sizes, dtype: torch.dtype) -> None:
        super().__init__()
        from unsloth.kernels.fast_lora import LoRA_W

        self.base, self.function, self.scaling = base, LoRA_W, ALPHA / sizes.rank
        like = {"dtype": dtype, "device": base.weight.device}
        self.A = nn.Parameter(torch.randn(sizes.rank, base.in_features, **like))
        self.B = nn.Parameter(torch.randn(base.out_features, sizes.rank, **like))

    def forward(self, x: Tensor) -> Tensor:
        """Computes y; the function wants a batch."""
        return self.function.apply(x[None], self.base.weight, None, self.A, self.B, self.scaling)[0]


RIVALS: dict[str, tuple[dict[str, Make], float]] = {  # what is measured, and the dropout probability
    "loop": (SINGLE | HEADS | {name: make for name, make in SEVERAL.items() if name.endswith("loop")}, 0.1),
    "peft": (SINGLE | {"PEFT's LoRA": LORA["PEFT's LoRA"]}, 0.1),
    "unsloth": (SINGLE | {"Unsloth's LoRA": UnslothLora}, 0.0),
}


def run(rival: str, device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    tokens, rounds, shapes = SIZES[size]
    makes, p = RIVALS[rival]
    sizes = Sizes(tokens, dropout_p=p)
    return {
        f"{n} -> {m}, bfloat16, {sizes}": measure(
            layers.variants(makes, sizes, (n, m), torch.bfloat16, device), rounds, device
        )
        for n, m in shapes
    }


if __name__ == "__main__":
    rival = sys.argv.pop(1) if sys.argv[1:] and sys.argv[1] in RIVALS else "loop"
    main(partial(run, rival))
