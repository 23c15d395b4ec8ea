"""grouped_lora against the frozen layer alone, LoRA in plain PyTorch and PEFT's layer, and against a copy.

Three kinds of table: forward + backward of one adapted layer, its frozen base and dx included, divided by the frozen
layer alone; the low-rank part alone, divided by a copy of as many bytes as it has to move (csrc/ops/grouped_lora.h);
and what a call costs that has next to nothing to compute.
"""

from collections.abc import Callable

import torch
from peft import LoraConfig, inject_adapter_in_model
from timing import Comparison, main, measure
from torch import Tensor, nn

from align_ext import AlignLoraConfig, replace_linear_with_align_lora

RANK, ALPHA, P = 8, 32, 0.1
# tokens, rounds, (in, out)
SIZES = {
    "cpu": (2048, 15, [(576, 1536), (2048, 5504)]),
    "cuda": (8192, 50, [(576, 1536), (2048, 5504), (4096, 11008)]),
    "quick": (16, 2, [(32, 48)]),
}


class PlainLora(nn.Module):
    """PEFT's formula in plain PyTorch."""

    def __init__(self, base: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.base = base
        self.lora_A = nn.Linear(base.in_features, RANK, bias=False, device=base.weight.device, dtype=dtype)
        self.lora_B = nn.Linear(RANK, base.out_features, bias=False, device=base.weight.device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Computes base(x) + s B A dropout(x)."""
        xd = nn.functional.dropout(x.to(self.lora_A.weight.dtype), P)
        return self.base(x) + (ALPHA / RANK * self.lora_B(self.lora_A(xd))).to(x.dtype)


def peft_lora(base: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """PEFT's own layer."""
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=P, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(base))[0]
    layer.lora_A.to(dtype)
    layer.lora_B.to(dtype)
    return layer


def align_lora(base: nn.Linear, dtype: torch.dtype) -> nn.Module:
    """This package's layer."""
    config = AlignLoraConfig(
        architecture="lora",
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=P,
        target_modules=["0"],
        adapter_dtype="float32" if dtype == torch.float32 else "base",
    )
    return replace_linear_with_align_lora(nn.Sequential(base), config)[0]  # type: ignore[index]


LAYERS = {"plain PyTorch LoRA": PlainLora, "PEFT's layer": peft_lora, "grouped_lora": align_lora}


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """One forward and backward in training."""
    x = x.detach().requires_grad_()
    trained = [x, *(p for p in layer.train().parameters() if p.requires_grad)]
    for weight in trained[1:]:  # B starts as zero
        nn.init.normal_(weight, std=RANK**-0.5)

    def run() -> None:
        for leaf in trained:
            leaf.grad = None
        layer(x).backward(dy)

    return run


def layers(tokens: int, n: int, m: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], None]]:
    """The frozen layer alone and every adapted one, with adapters of its dtype and of float32."""
    x, dy = (torch.randn(tokens, width).to(device, dtype) for width in (n, m))
    base = nn.Linear(n, m, bias=False, device=device, dtype=dtype).requires_grad_(False)
    result = {"frozen layer alone": step(base, x, dy)}
    for adapter in dict.fromkeys((dtype, torch.float32)):
        suffix = "" if adapter == dtype else ", float32 adapters"
        result |= {name + suffix: step(make(base, adapter), x, dy) for name, make in LAYERS.items()}
    return result


def low_rank(tokens: int, n: int, m: int, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Comparison]:
    """Both passes of the low-rank part, each against a copy of the bytes that it moves."""
    sizes = [(tokens, n), (RANK, n), (m, RANK), (tokens, m), (tokens, m), (tokens, RANK)]
    x, A, B, base, dy, dz = (torch.randn(size).to(device, dtype) for size in sizes)
    dz, rng = dz.float(), torch.tensor([1, 2], device=device)
    native, none = torch.ops.align_ext, (None, None)

    def forward() -> tuple[Tensor, Tensor]:
        return native.grouped_lora(x, A, B, 4.0, None, None, P, rng, None, None, base, *none)

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
        results[title] = measure(variants, rounds, device, bytes_moved=total)
    return results


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title."""
    torch.manual_seed(0)
    tokens, rounds, shapes = SIZES[size]
    results = {}
    for n, m in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            title = f"layer, forward + backward, {n} -> {m}, {dtype}, T={tokens}, r={RANK}, p={P}"
            results[title] = measure(layers(tokens, n, m, dtype, device), rounds, device)
            results |= low_rank(tokens, n, m, dtype, device, rounds)
    tiny = layers(4, 16, 16, torch.float32, device)
    results["calling a layer, forward + backward, 16 -> 16, T=4"] = measure(tiny, 20 * rounds, device, host=True)
    return results


if __name__ == "__main__":
    main(run)
