"""grouped_lora against the frozen layer alone and LoRA in plain PyTorch: forward + backward with dx, r=8, p=0.1."""

from collections.abc import Callable

import torch
from timing import main, measure
from torch import Tensor

from align_ext import ops

TOKENS, RANK, P, ROUNDS = 2048, 8, 0.1, 15
SHAPES = [(576, 1536), (2048, 5504)]


def step(forward: Callable[[Tensor, Tensor, Tensor], Tensor], inputs: list[Tensor], dy: Tensor) -> Callable[[], None]:
    """One forward and backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        forward(*leaves).backward(dy)

    return run


def variants(n: int, m: int, dtype: torch.dtype) -> dict[str, Callable[[], None]]:
    """The layer alone, PEFT's formula in plain PyTorch, and ours."""
    x, W = torch.randn(TOKENS, n).to(dtype), (torch.randn(m, n) / n**0.5).to(dtype)
    A, B, dy = torch.randn(RANK, n) / n**0.5, torch.randn(m, RANK), torch.randn(TOKENS, m).to(dtype)

    def plain(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        xd = torch.nn.functional.dropout(x.to(A.dtype), P)
        return x @ W.T + (4 * (xd @ A.T) @ B.T).to(x.dtype)

    def ours(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return ops.grouped_lora(x, A, B, 4.0, dropout_p=P, weight=W)[0]

    result = {
        "frozen layer alone": step(lambda x, A, B: x @ W.T, [x, A, B], dy),
        "plain PyTorch LoRA": step(plain, [x, A.to(dtype), B.to(dtype)], dy),
        "grouped_lora": step(ours, [x, A.to(dtype), B.to(dtype)], dy),
    }
    if dtype != torch.float32:
        result["plain PyTorch LoRA, float32 adapters"] = step(plain, [x, A, B], dy)
        result["grouped_lora, float32 adapters"] = step(ours, [x, A, B], dy)
    return result


def run() -> dict[str, dict[str, list[float]]]:
    """Times by title and variant."""
    torch.manual_seed(0)
    return {
        f"{n} -> {m}, {dtype}, T={TOKENS}, r={RANK}, p={P}": measure(variants(n, m, dtype), ROUNDS)
        for n, m in SHAPES
        for dtype in (torch.float32, torch.bfloat16)
    }


if __name__ == "__main__":
    main(run)
