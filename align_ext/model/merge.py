"""Merges adapters into the base weights, or removes them."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_block import Adapted, adapted_layers
from align_ext.adapters.adapted_linear import AdaptedWeight
from align_ext.alignment.forward_hooks import remove_hooks
from align_ext.alignment.model_state import require_state
from align_ext.base_model.modules_to_save import restore_base, trained_rows
from align_ext.base_model.sharded import refuse_sharded
from align_ext.base_model.token_rows import put, wrappers_of
from align_ext.model.save_pretrained import restore_methods
from align_ext.system.messages import shown

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MergeReport:
    """The effect of an approximate merge on the outputs.

    Attributes:
        kl: mean over the batch's tokens of KL(before || after) of the next token's distribution, in nats.
        agreement: the fraction of these tokens whose most likely next token is unchanged.
        tokens: the number of tokens, without padding.
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
    model: nn.Module,
    approximate: Literal["uniform"] | None = None,
    batch: Mapping[str, Any] | None = None,
    *,
    safe_merge: bool = True,
    adapter_names: Sequence[str] | None = None,
) -> nn.Module:
    """Merges each adapter into its base weight, W + s Σ B A in float32 (DoRA: g times that), restores the base layers.

    Exact for all without a router; of those with an adapter for each task, it is that of the task that set_task chose.
    A routed adapter is not a change of the weight; approximate="uniform" merges it with equal weights of all heads,
    measures on a batch how much the outputs change, logs it, and stores it as `model.merge_report` (a MergeReport).
    Adapters beside whole blocks, and beside a weight that two modules share (a tied head), cannot be merged. Tensors
    that were trained beside the adapters keep their values, and trained rows of embeddings are written into them.

    Args:
        model: a model with adapters.
        approximate: "uniform", or None to merge exactly or raise.
        batch: the model's inputs (input_ids, attention_mask, ...); needed for approximate.
        safe_merge: whether all layers are merged on trial before the first one is changed. False takes half the time,
            and of a weight that is not finite it says so when earlier layers are merged already.
        adapter_names: PEFT's list of adapters; here the active one alone, or None, which means it.

    Returns:
        The model; for an adopted PeftModel, the plain model inside it.

    Raises:
        ValueError: a layer cannot be merged, or its merged weight is not finite (float16 overflows); the model is then
            unchanged (with safe_merge), and the message names the layer and the reason. Or adapter_names names another.
    """
    refuse_sharded(model, "merge_and_unload")
    layers = adapted_layers(model)
    if approximate not in (None, "uniform"):
        raise ValueError(f'approximate={approximate!r} must be "uniform" or None')
    if approximate and batch is None:
        raise ValueError('approximate="uniform" changes the outputs: give batch={...}, to measure how much')
    if batch is not None and not isinstance(batch, Mapping):
        raise ValueError(f"batch={shown(batch)} must be a mapping of the model's inputs by name (input_ids, ...)")
    if adapter_names is not None and list(adapter_names) != [active := require_state(model).name]:
        raise ValueError(
            f"adapter_names={shown(adapter_names)}: the active adapter, {shown(active)}, is merged: choose another by "
            "set_adapter(model, name), or make one of several by add_weighted_adapter"
        )
    for name, layer in layers.items():
        if reason := layer.unmergeable_reason() if approximate is None else _approximation_problem(layer):
            raise ValueError(f"{name} cannot be merged: {reason}")
    before = None if batch is None or approximate is None else _log_probabilities(model, batch)
    weights = {name: layer for name, layer in layers.items() if isinstance(layer, AdaptedWeight)}

    def delta(layer: AdaptedWeight) -> Tensor | None:
        return layer.adapter.uniform_delta_weight() if approximate else None

    rows = trained_rows(model)
    for name, module in rows.items():
        if not torch.isfinite(module.adapter.rows).all():
            raise ValueError(f"{name} cannot be merged: its trained rows are not finite: load an earlier checkpoint")
    for change in (False, True) if safe_merge else (True,):
        for name, weight in weights.items():
            try:
                if change:
                    weight.merged_base(delta(weight))
                elif not weight.merged:
                    weight.merged_weight(delta(weight))
            except ValueError as error:
                raise ValueError(f"{name} cannot be merged: {error}") from error
    for module in rows.values():
        module.merge()
    plain = restore_layers(model, layers)
    if before is not None and batch is not None:
        plain.merge_report = _compare(before, _log_probabilities(plain, batch))  # type: ignore[assignment]
        logger.info("merged approximately: %s", plain.merge_report)
    return plain


def unload(model: nn.Module) -> nn.Module:
    """Removes the adapters, also merged ones; the model then computes the same as its base and stays frozen.

    Returns:
        The model; for an adopted PeftModel, the plain model inside it.

    Raises:
        ValueError: other tensors were trained too, and their base values are not known; the model is then unchanged.
    """
    refuse_sharded(model, "unload")
    layers = adapted_layers(model)
    restore_base(model)
    for layer in layers.values():
        if isinstance(layer, AdaptedWeight):
            layer.unmerge()
    return restore_layers(model, layers)


def _approximation_problem(layer: Adapted) -> str | None:
    """Returns why not even an approximation can be merged, or None."""
    if not isinstance(layer, AdaptedWeight):
        return layer.unmergeable_reason()
    return layer.base_unmergeable_reason() or (
        "its adapter is merged already: unmerge it first" if layer.merged else None
    )


def restore_layers(model: nn.Module, layers: Mapping[str, Adapted]) -> nn.Module:
    """Puts the base's layers in the places of the adapted ones; returns the plain model."""
    for name, layer in layers.items():
        parent, _, child = layer.base_name(name).rpartition(".")
        setattr(model.get_submodule(parent), child, layer.base_layer)
    put(model, {wrapper: base for base, wrapper in wrappers_of(model).items()})
    remove_hooks(model)
    return restore_methods(model)


@torch.no_grad()
def _log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Returns the next token's log probabilities in eval mode, [tokens, vocabulary], in float32 or higher."""
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
