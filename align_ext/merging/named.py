"""Makes one adapter of several that a model has by name: add_weighted_adapter, join_adapters."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn.functional import pad

from align_ext.adapters.base import Adapter
from align_ext.base_model.modules_to_save import plain_name
from align_ext.config import AlignLoraConfig
from align_ext.io.peft_format import unexportable_reason
from align_ext.merging.arithmetic import (
    DenseDelta,
    LoraWeights,
    check_adapters,
    matrices,
    more_than_matrices,
    options_of,
    task_arithmetic,
    ties,
    truncated,
)
from align_ext.model.named import named_adapter, new_adapter
from align_ext.model.replace import insert_adapters
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown

_KINDS = ("cat", "svd", "ties_svd")


def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "cat",
    svd_rank: int | None = None,
    density: float = 0.2,
) -> None:
    """Adds an adapter that is a sum of others, by the functions of merging/arithmetic.py; it is not active.

    "cat": Δ = Σ_k w_k s_k B_k A_k, exactly, the ranks add up. "svd": the nearest adapter of rank svd_rank. "ties_svd":
    the nearest one of TIES (2306.01708) of the adapters, each multiplied by its weight.

    Args:
        model: a model with adapters.
        adapters: the names of adapters on the same layers, each one change of the weight (lora, align_lora, m_lora,
            hydra without a router).
        weights: w_k, a number for each.
        adapter_name: the name of the new one, a plain LoRA.
        combination_type: PEFT's name of how they are combined.
        svd_rank: its rank with "svd" and "ties_svd"; None: the largest rank of the adapters.
        density: the fraction of values that TIES keeps, in (0, 1].

    Raises:
        ValueError: an unknown name or combination_type, adapters that do not fit each other or are no fixed change of
            the weights, or what set_adapter refuses. The model is then unchanged.
    """
    if combination_type not in _KINDS:
        raise ValueError(unknown_name("combination_type", combination_type, _KINDS))
    parts = [_weights_of(model, name) for name in adapters]
    total: LoraWeights | DenseDelta = task_arithmetic(parts, weights)
    if combination_type == "ties_svd":
        total = ties([task_arithmetic([part], [w]) for part, w in zip(parts, weights, strict=True)], density)
    if not isinstance(total, LoraWeights) or combination_type == "svd":
        total, _ = truncated(total, svd_rank or max(map(_rank, parts)))
    _add(model, adapter_name, options_of(total), [total])


def join_adapters(model: nn.Module, adapters: Sequence[str], adapter_name: str) -> None:
    """Adds a multi_adapter of which task k is the k-th of these adapters, so that one batch can mix them; not active.

    A sample's adapter is its task: model(**batch, task_ids=ids), or set_task(model, k) for all. Smaller ranks are
    filled with zeros.

    Args:
        model: a model with adapters.
        adapters: the names of adapters on the same layers, each one change of the weight.
        adapter_name: the name of the new one.

    Raises:
        ValueError: as of add_weighted_adapter.
    """
    parts = [_weights_of(model, name) for name in adapters]
    check_adapters(parts)
    r = max(map(_rank, parts))
    config = AlignLoraConfig(
        architecture="multi_adapter", r=r, lora_alpha=r, lora_dropout=0.0, num_tasks=len(parts),
        target_modules=tuple(parts[0].layers),
    )  # fmt: skip
    _add(model, adapter_name, config, parts)


def _weights_of(model: nn.Module, adapter_name: str) -> LoraWeights:
    """Returns the matrices of one of a model's adapters, by names in the plain model."""
    adapter = named_adapter(model, adapter_name)
    adapters = {plain_name(model, name): layer.adapter for name, layer in adapter.layers.items()}
    reason = unexportable_reason(adapters, adapter.state.config)
    reason = reason or more_than_matrices(adapters, adapter.state.config, adapter.trained)
    if reason is not None:
        raise ValueError(f"adapter {shown(adapter_name)}: only plain LoRA adapters can be composed: {reason}")
    return LoraWeights(matrices(adapters), {})


def _rank(adapter: LoraWeights) -> int:
    return max(len(A) for A, _ in adapter.layers.values())


def _add(model: nn.Module, adapter_name: str, config: AlignLoraConfig, parts: Sequence[LoraWeights]) -> None:
    """Adds an adapter that holds the matrices of one LoRA, or of each task's."""
    ranks = {name: max(len(part.layers[name][0]) for part in parts) for name in parts[0].layers}

    def fill(adapters: dict[str, Adapter]) -> None:
        for name, adapter in adapters.items():
            pairs = [part.layers[name] for part in parts]
            A = torch.stack([pad(A, (0, 0, 0, ranks[name] - len(A))) for A, _ in pairs])
            B = torch.stack([pad(B, (0, ranks[name] - B.shape[1])) for _, B in pairs])
            adapter.scaling = 1.0
            adapter.lora_A.data.copy_(A.view_as(adapter.lora_A))
            adapter.lora_B.data.copy_(B.view_as(adapter.lora_B))

    with new_adapter(model, adapter_name):
        insert_adapters(model, config, ranks, (), fill)
