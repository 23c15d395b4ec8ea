"""The oracle of align_ext/ops/sibling_lora.py: one layer after the other."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from align_ext.reference.dropout_sum import dropout_sum
from align_ext.reference.philox import dropout_mask
from align_ext.reference.routed_lora import routed_lora


def sibling_lora(
    x: Tensor, A: Sequence[Tensor], B: Sequence[Tensor], scaling: Sequence[float], *, R: Sequence[Tensor] = (),
    reduce: str = "sum", top_k: int | None = None, tau: float = 1.0, site: str = "input", dropout_p: float = 0.0,
    rng: Tensor | None = None, A0: Sequence[Tensor] = (), B0: Sequence[Tensor] = (), weight: Sequence[Tensor],
    bias: Sequence[Tensor | None] | None = None,
) -> tuple[tuple[Tensor, ...], ...]:  # fmt: skip
    """Computes y_i, z_i and w_i of layers with the same x: dropout_sum of each, or routed_lora."""
    tokens = x.shape[:-1].numel()
    elements = [x.shape[-1] if site == "input" else b[..., 0, :].numel() for b in B]
    masks = None
    if dropout_p > 0 and rng is not None:
        masks = dropout_mask(rng, dropout_p, (tokens, sum(elements)), x.dtype).split(elements, 1)
    outputs: list[Any] = []
    for i, (a, b, s) in enumerate(zip(A, B, scaling, strict=True)):
        options: dict[str, Any] = {"site": site, "weight": weight[i], "bias": None if bias is None else bias[i]}
        if masks is not None:
            options["mask"] = masks[i]
        if A0:
            options |= {"A0": A0[i], "B0": B0[i]}
        heads = b if b.dim() == 3 else b[None]
        if R:
            outputs.append(routed_lora(x, a, heads, R[i], s, top_k=top_k, tau=tau, **options))
        else:
            outputs.append(dropout_sum(x, a, heads, s, reduce=reduce, **options))
    y, z, *w = zip(*outputs, strict=True)
    return y, z, w[0] if w else ()
