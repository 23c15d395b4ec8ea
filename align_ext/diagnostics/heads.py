"""Similarity of the heads of a layer, and of what they have learned."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from align_ext.adapters.capture import adapters_of
from align_ext.diagnostics.cosines import cosines


def copy_heads(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of the heads B of each layer with several; taken before training, it tells what they learn.

    Returns:
        Module name -> [N, m, r] on the CPU; empty for architectures of one head.
    """
    return {name: B.detach().cpu().clone() for name, B in _heads(model).items()}


def head_similarity(model: nn.Module, start: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Computes the cosine of every pair of flattened heads of each layer (2508.05078, Figure 2).

        cos(B_i, B_j) = <B_i, B_j> / (|B_i| |B_j|),   with start: of B_i - B_i(0) and B_j - B_j(0)

    Values near 1 mean that the heads learned the same and one would be enough. Heads that started at random (r_lora,
    m_lora) keep the similarity of their start for many steps, whatever they learn: there the change is what tells.
    For multi_adapter, the B of the tasks; for mtlora_cvpr, that of all tasks and then those.

    Args:
        model: a model whose adapters have several heads (hydra, m_lora, lora_moe, ...) or tasks.
        start: what copy_heads returned before training.

    Returns:
        Module name -> [N, N], float32; NaN for heads that are (or whose change is) still zero.

    Raises:
        ValueError: no layer has several heads, or start is of other layers.
    """
    heads = _heads(model)
    if not heads:
        raise ValueError("no layer has several heads: their similarity is one of hydra, r_lora, m_lora, ...")
    return {name: cosines(change.flatten(1)) for name, change in changes(heads, start).items()}


def changes(heads: Mapping[str, Tensor], start: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Returns B - B(0) of each layer, or B without a start, on the CPU.

    Raises:
        ValueError: start is of other layers or sizes.
    """
    heads = {name: B.detach().cpu() for name, B in heads.items()}
    if start is None:
        return heads
    for name, B in heads.items():
        if name not in start or start[name].shape != B.shape:
            raise ValueError(
                f"start has no heads {list(B.shape)} of the layer {name}: give what copy_heads(model) returned before "
                "training"
            )
    return {name: B - start[name].to(B) for name, B in heads.items()}


def _heads(model: nn.Module) -> dict[str, Tensor]:
    heads: dict[str, Any] = {name: adapter.lora_B for name, adapter in adapters_of(model).items()}
    return {name: B for name, B in heads.items() if B.dim() == 3}
