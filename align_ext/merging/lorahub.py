"""LoRAHub (2307.13269): combines trained adapters for a new task from a few examples, without gradients."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.alignment.model_state import find_state
from align_ext.merging.arithmetic import LoraWeights, combined, linear_of, options_of
from align_ext.model.merge import unload
from align_ext.model.replace import insert_adapters


@dataclass(frozen=True)
class Search:
    """Options of LoRAHub's search; the defaults are those of the paper.

    Attributes:
        steps: the number of tried weight vectors.
        l1: alpha, the factor on the sum of the weights' magnitudes.
        bound: the weights are in -bound .. bound.
        seed: the seed of the search.
    """

    steps: int = 40
    l1: float = 0.05
    bound: float = 1.5
    seed: int = 0


@dataclass(frozen=True)
class LoraHub:
    """The result of LoRAHub.

    Attributes:
        weights: w_k, one weight per adapter.
        objective: the value of loss + l1 * Σ |w_k| for these weights.
        adapter: the combined adapter.
    """

    weights: list[float]
    objective: float
    adapter: LoraWeights


def lorahub(
    model: nn.Module,
    adapters: Sequence[LoraWeights],
    examples: Iterable[Mapping[str, Any]],
    search: Search | None = None,
    console: Console | None = None,
) -> LoraHub:
    """Finds weights of adapters for a new task from a few examples, without gradients (LoRAHub, 2307.13269).

        minimise over w:  loss(model with A = Σ w_k A_k, B = Σ w_k B_k) + l1 * Σ_k |w_k|

    The search is nevergrad's NGOpt from w = 0; the best tried weights are returned.

    Args:
        model: the plain base model; it has adapters during the search, and is frozen afterwards.
        adapters: adapters of one base and one rank.
        examples: batches of model inputs with labels; the loss is the mean of model(**batch).loss.
        search: the options of the search.
        console: shows a progress bar; None: no bar.

    Raises:
        ValueError: adapters do not fit each other or the model, there are no examples, or nevergrad is not installed.
    """
    search, batches = search or Search(), list(examples)
    start = combined(adapters, [0.0] * len(adapters))
    if not batches:
        raise ValueError("examples is empty: LoRAHub needs a few batches of the task, with labels")
    if find_state(model) is not None:
        raise ValueError("the model has adapters already: unload(model) first")
    for name in start.layers:
        linear_of(model, name)
    optimizer = _optimizer(len(adapters), search)
    training = model.training
    insert_adapters(model.eval(), options_of(start), {name: len(A) for name, (A, _) in start.layers.items()})
    try:
        best = ([0.0] * len(adapters), float("inf"))
        shown = console is not None and console.is_terminal
        for _ in track(range(search.steps), "LoRAHub", console=console, transient=True, disable=not shown):
            candidate = optimizer.ask()
            weights = [float(weight) for weight in candidate.value]
            _set_weights(model, combined(adapters, weights))
            objective = _mean_loss(model, batches) + search.l1 * sum(map(abs, weights))
            optimizer.tell(candidate, objective)
            best = min(best, (weights, objective), key=lambda pair: pair[1])
    finally:
        unload(model).train(training)
    return LoraHub(*best, combined(adapters, best[0]))


def _optimizer(size: int, search: Search) -> Any:
    try:
        import nevergrad
    except ModuleNotFoundError as error:
        raise ValueError("LoRAHub's search needs nevergrad: pip install 'align_ext[compose]'") from error
    weights = nevergrad.p.Array(init=[0.0] * size).set_bounds(-search.bound, search.bound)
    weights.random_state.seed(search.seed)
    return nevergrad.optimizers.NGOpt(parametrization=weights, budget=search.steps)


@torch.no_grad()
def _set_weights(model: nn.Module, adapter: LoraWeights) -> None:
    for name, layer in adapted_layers(model).items():
        adapter_of_layer: Any = layer.adapter
        A, B = adapter.layers[name]
        adapter_of_layer.lora_A.copy_(A)
        adapter_of_layer.lora_B.copy_(B)
        adapter_of_layer.scaling = 1.0  # B includes the scaling


@torch.no_grad()
def _mean_loss(model: Any, batches: list[Mapping[str, Any]]) -> float:
    return sum(float(model(**batch).loss) for batch in batches) / len(batches)
