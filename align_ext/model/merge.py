"""Adapters merged into the base weights, or taken off again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_block import AdaptedBlock, adapted_layers
from align_ext.adapters.base import AdaptedLinear
from align_ext.alignment.forward_hooks import remove_hooks
from align_ext.base_model.modules_to_save import give_back
from align_ext.base_model.sharded import refuse_parts
from align_ext.model.save_pretrained import stand_down
from align_ext.system.reading import shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """What an approximate merge changed.

    Attributes:
        kl: mean over the batch's tokens of KL(before || after) of the next token's distribution, in nats.
        agreement: share of these tokens whose likeliest next token stayed.
        tokens: how many there were; padding does not count.
    """

    kl: float
    agreement: float
    tokens: int

    def __str__(self) -> str:
        return (
            f"KL of the outputs before and after the merge {self.kl:.3g} nats a token, the same likeliest next token "
            f"in {self.agreement:.1%} of {self.tokens} tokens"
        )


def merge_and_unload(
    model: nn.Module, approximate: Literal["uniform"] | None = None, batch: Mapping[str, Any] | None = None
) -> nn.Module:
    """Merges each adapter into its base weight, W + s Σ B A in float32, and puts the base layers back.

    Exact for lora, align_lora, m_lora, hydra without a router, and multi_adapter's task that set_task named. Routed
    adapters are no change of the weight; approximate="uniform" merges what they are with equal weights of all heads,
    measures on a batch how far the outputs move, logs it, and leaves it as `model.merge_report` (a MergeReport).
    Adapters beside whole blocks cannot be merged. What was trained beside the adapters stays as it is.

    Args:
        model: with adapters.
        approximate: None: exactly or not at all.
        batch: the model's inputs (input_ids, attention_mask, ...), for approximate.

    Returns:
        The model; of a PeftModel that was adopted, the plain model inside.

    Raises:
        ValueError: a layer cannot be merged, or its merged weight is not finite (float16 overflows); nothing was
            changed then, and the message says which and why.
    """
    refuse_parts(model, "merge_and_unload")
    layers = adapted_layers(model)
    if approximate not in (None, "uniform"):
        raise ValueError(f'approximate={approximate!r} must be "uniform" or None')
    if approximate and batch is None:
        raise ValueError('approximate="uniform" changes the outputs: give batch={...}, to measure how much')
    if batch is not None and not isinstance(batch, Mapping):
        raise ValueError(f"batch={shown(batch)} must be a mapping of the model's inputs by name (input_ids, ...)")
    for name, layer in layers.items():
        if reason := layer.unmergeable_reason() if approximate is None else _cannot_approximate(layer):
            raise ValueError(f"{name} cannot be merged: {reason}")
    before = None if batch is None or approximate is None else _log_probabilities(model, batch)
    linears = {name: layer for name, layer in layers.items() if isinstance(layer, AdaptedLinear)}

    def delta(layer: AdaptedLinear) -> Tensor | None:
        return layer.adapter.uniform_delta_weight() if approximate else None

    for name, layer in linears.items():
        try:
            if not layer.merged:
                layer.merged_weight(delta(layer))  # of all, before the first is written
        except ValueError as error:
            raise ValueError(f"{name} cannot be merged: {error}") from error
    plain = _put_back(model, {name: layer.merged_base(delta(layer)) for name, layer in linears.items()})
    if before is not None and batch is not None:
        plain.merge_report = _compare(before, _log_probabilities(plain, batch))  # type: ignore[assignment]
        logger.info("merged approximately: %s", plain.merge_report)
    return plain


def unload(model: nn.Module) -> nn.Module:
    """Removes the adapters, merged by hand or not: the model computes what its base computes; all of it stays frozen.

    Returns:
        The model; of a PeftModel that was adopted, the plain model inside.

    Raises:
        ValueError: something else was trained too whose value in the base model is not kept; nothing was changed then.
    """
    refuse_parts(model, "unload")
    layers = adapted_layers(model)
    give_back(model)
    for layer in layers.values():
        if isinstance(layer, AdaptedLinear):
            layer.unmerge()
    return _put_back(model, {name: layer.base_layer for name, layer in layers.items()})


def _cannot_approximate(layer: AdaptedLinear | AdaptedBlock) -> str | None:
    """Why not even an approximation can be merged, or None."""
    if not isinstance(layer, AdaptedLinear):
        return layer.unmergeable_reason()
    return layer.base_unmergeable_reason() or (
        "its adapter is merged already: unmerge it first" if layer.merged else None
    )


def _put_back(model: nn.Module, bases: dict[str, nn.Module]) -> nn.Module:
    for name, base in bases.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, base)
    remove_hooks(model)
    return stand_down(model)


@torch.no_grad()
def _log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The logarithms of the next token's probabilities in evaluation, [tokens, vocabulary], float32 at least."""
    training = model.training
    try:
        output = model.eval()(**{name: tensor for name, tensor in batch.items() if name != "task_ids"})
    finally:
        model.train(training)
    logits: Tensor = output.logits if hasattr(output, "logits") else output
    mask = batch.get("attention_mask")
    logits = logits.flatten(0, -2) if mask is None else logits[mask.bool()]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _compare(before: Tensor, after: Tensor) -> MergeReport:
    kl = (before.exp() * (before - after)).sum(-1).mean()
    agreement = (before.argmax(-1) == after.argmax(-1)).float().mean()
    return MergeReport(float(kl), float(agreement), len(before))
