"""routed_lora against the frozen layer alone and the same routing in plain PyTorch: forward + backward, base included.

hydra: one A, a softmax over all heads; lora_moe: an A per head, the two largest of the softmax; mtlora: one A and
weights of their own for each eighth of the outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from align_ext.bench.timing import Comparison, main, measure, training_step
from align_ext.ops import routed_lora

RANK, HEADS, SCALING, P = 8, 4, 4.0, 0.1
ARCHITECTURES = {"hydra": (1, False, None), "lora_moe": (1, True, 2), "mtlora": (8, False, None)}  # G, own A, top_k
SIZES = {  # tokens, rounds, (in, out)
    "cpu": (2048, 10, [(576, 1536), (2048, 5504)]),
    "cuda": (8192, 50, [(576, 1536), (2048, 5504), (4096, 11264)]),
    "quick": (16, 2, [(32, 48)]),
}


def plain(x: Tensor, A: Tensor, B: Tensor, R: Tensor, weight: Tensor, top_k: int | None) -> Tensor:
    """The formula as its papers' code has it, one head after the other."""
    logits = linear(x, R).unflatten(-1, (-1, HEADS))
    if top_k:
        logits = logits.masked_fill(logits < logits.topk(top_k, dim=-1).values[..., -1:], float("-inf"))
    w = logits.softmax(dim=-1, dtype=torch.float32).to(x.dtype)
    y, xd = linear(x, weight), dropout(x, P)
    for i, head in enumerate(B):
        out = linear(linear(xd, A[i] if A.dim() == 3 else A), head).unflatten(-1, (w.shape[1], -1))
        y = y + SCALING * (w[..., i, None] * out).flatten(1)
    return y


def variants(tokens: int, n: int, m: int, dtype: torch.dtype, device: str) -> dict[str, Callable[[], None]]:
    """The frozen layer alone, then both implementations of each architecture."""
    x, weight, dy = (torch.randn(size).to(device, dtype) for size in [(tokens, n), (m, n), (tokens, m)])
    result = {"frozen layer alone": training_step(lambda x: linear(x, weight), [x], dy)}
    for architecture, (groups, A_per_head, top_k) in ARCHITECTURES.items():
        sizes = [(HEADS, RANK, n) if A_per_head else (RANK, n), (HEADS, m, RANK), (groups * HEADS, n)]
        leaves = [x, *(torch.randn(size).to(device, dtype) for size in sizes)]
        options = {"top_k": top_k, "dropout_p": P, "weight": weight}
        calls = {
            "plain PyTorch": lambda x, A, B, R, k=top_k: plain(x, A, B, R, weight, k),
            "routed_lora": lambda x, A, B, R, o=options: routed_lora(x, A, B, R, SCALING, **o)[0],
        }
        result |= {f"{architecture}, {name}": training_step(call, leaves, dy) for name, call in calls.items()}
    return result


def run(device: str, size: str) -> dict[str, Comparison]:
    """Comparisons by title, of each width and dtype."""
    torch.manual_seed(0)
    results = {}
    tokens, rounds, shapes = SIZES[size]
    for n, m in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            title = f"forward + backward, {n} -> {m}, {dtype}, T={tokens}, r={RANK}, N={HEADS}, p={P}"
            results[title] = measure(variants(tokens, n, m, dtype, device), rounds, device)
    return results


if __name__ == "__main__":
    main(run)
