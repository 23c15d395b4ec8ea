"""DoRA (2402.09353): the norm of each row of the adapted weight is trained by itself, beside its direction.

    V = W + s Σ B A,   g = m / ||V||     m [out], trained; ||V|| [out], the norms of V's rows, constants to the gradient
    y = g (V x) + bias

The norms are constants as in section 4.3 of the paper. Dropout of x acts on what the change of the weight, g V - W,
makes of it: y = W x + (g V - W) dropout(x) + bias, as in PEFT (docs/numerics.md). Masks on latents stay where they are.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from align_ext.adapters.base import Factors, at_least_float32

_IN_CACHE, _AT_ONCE = 1 << 18, 1 << 26  # elements of V that are made at a time on a CPU, and elsewhere


def row_norms(weight: Tensor, factors: list[Factors], scaling: float) -> Tensor:
    """Computes the norm of each row of W + s Σ B A, [out], in float32 (float64 for float64), block of rows by block.

    Args:
        weight: W [out, in], of any floating-point dtype.
        factors: pairs A [r, in] and B [out, r].
        scaling: s.
    """
    kind = weight.device.type
    A = scaling * torch.cat([at_least_float32(A) for A, _ in factors])
    B = torch.cat([at_least_float32(B) for _, B in factors], 1)
    in_cache = kind == "cpu" and not torch.compiler.is_compiling()  # a graph would hold every block
    rows = max(1, (_IN_CACHE if in_cache else _AT_ONCE) // weight.shape[1])
    with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
        blocks = zip(weight.split(rows), B.split(rows), strict=True)
        return torch.cat([torch.linalg.vector_norm(torch.addmm(w.to(A.dtype), b, A), dim=1) for w, b in blocks])


def scale_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    """Computes g = m / ||V||, [out]; a row of zeros stays one."""
    return magnitude / norms.masked_fill(norms == 0, 1)


def rescaled(y: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """Computes g (y - bias) + bias in float32 or wider; where g is 1, y to the bit."""
    return y * scale if bias is None else torch.addcmul((1 - scale) * bias, y, scale)
