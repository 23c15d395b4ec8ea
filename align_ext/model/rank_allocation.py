"""AdaLoRA's allocation of ranks (2303.10512): triplets of all layers compete for a budget that falls in training.

    loss.backward()
    optimizer.step()
    update_and_allocate(model, step)    # step = 1, 2, ...: the optimizer steps that have been made
    optimizer.zero_grad()

AlignTrainer does this by itself. A triplet i of a layer is column i of P, λ_i and row i of Q. Each weight w has a
smoothed sensitivity and an uncertainty, and a triplet an importance:

    I = |w dL/dw|
    Ī <- beta1 Ī + (1 - beta1) I         Ū <- beta2 Ū + (1 - beta2) |I - Ī|         s(w) = Ī Ū
    S_i = s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij)

In the steps of an allocation the b(t) triplets of the largest S keep their λ, and that of all others becomes zero. Of
equal ones the first layers' win. What is pruned is trained on and may come back, until the last tfinal steps, in which
the triplets of the last allocation are those that there are.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.adalora import AdaLoraAdapter
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.base import at_least_float32
from align_ext.alignment.model_state import require_state
from align_ext.base_model.modules_to_save import plain_name
from align_ext.base_model.sharded import shard_ranks, unwrapped
from align_ext.config import AlignLoraConfig
from align_ext.system.bounds import is_whole
from align_ext.system.messages import shown

_PARTS = ("lora_B", "lora_E", "lora_A")


@dataclass(frozen=True)
class RankSchedule:
    """The budget b(t), in triplets of all layers together.

        b(t) = floor(b_T + (b_0 - b_T) (1 - (t - tinit) / (T - tfinal - tinit))³)    tinit < t < T - tfinal

    with b_0 before that and b_T = target_r times the number of layers after it.

    Attributes:
        begin: tinit.
        end: T - tfinal, the step of the last allocation.
        interval: deltaT.
        first: b_0.
        last: b_T.
    """

    begin: int
    end: int
    interval: int
    first: int
    last: int

    @classmethod
    def of(cls, config: AlignLoraConfig, total: int, layers: int) -> RankSchedule:
        """Returns the schedule of a training of this many optimizer steps.

        Raises:
            ValueError: tinit and tfinal leave no step in which ranks fall.
        """
        begin = total // 6 if config.tinit is None else config.tinit
        final = total // 2 if config.tfinal is None else config.tfinal
        if begin + final >= total:
            raise ValueError(
                f"tinit={begin} and tfinal={final} leave none of {total} optimizer steps for ranks to fall in: choose "
                "smaller ones, or more steps"
            )
        return cls(begin, total - final, config.deltaT or 1, config.r * layers, config.final_rank * layers)

    def budget(self, step: int) -> int:
        """Returns b(step), for step = 1, 2, ..."""
        left = 1 - (min(max(step, self.begin), self.end) - self.begin) / (self.end - self.begin)
        return int((self.first - self.last) * left**3 + self.last)

    def allocates(self, step: int) -> bool:
        """Whether ranks are allocated after this step, before the last allocation."""
        return self.begin < step < self.end and step % self.interval == 0


@dataclass
class TripletImportance:
    """What a training knows of its triplets, by the names of layers; a checkpoint has it too.

    Attributes:
        sensitivity: Ī of each of P, Λ and Q, as tensors of their shapes, in float32 or wider.
        uncertainty: Ū, likewise.
        kept: after the last allocation, which triplets there are, bool [r]; sensitivity and uncertainty are then empty.
    """

    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Tensor] = field(default_factory=dict)

    def update(self, adapters: dict[str, AdaLoraAdapter], beta1: float, beta2: float) -> None:
        """Takes the gradients of a step in."""
        weights = {f"{name}.{part}": getattr(adapter, part) for name, adapter in adapters.items() for part in _PARTS}
        if all(weight.grad is None for weight in weights.values()):
            raise RuntimeError("there are no gradients: call update_and_allocate before optimizer.zero_grad()")
        now: Any = [_sensitivity(weight) for weight in weights.values()]
        for averages in (self.sensitivity, self.uncertainty):
            if not averages:
                averages.update(zip(weights, map(torch.zeros_like, now), strict=True))
        sensitivity, uncertainty = ([of[key] for key in weights] for of in (self.sensitivity, self.uncertainty))
        torch._foreach_mul_(sensitivity, beta1)
        torch._foreach_add_(sensitivity, now, alpha=1 - beta1)
        torch._foreach_sub_(now, sensitivity)
        torch._foreach_abs_(now)
        torch._foreach_mul_(uncertainty, beta2)
        torch._foreach_add_(uncertainty, now, alpha=1 - beta2)

    def to_tensors(self) -> dict[str, Tensor]:
        """Returns everything by "<attribute>/<name>"."""
        return {f"{part}/{name}": tensor for part, of in vars(self).items() for name, tensor in of.items()}

    def scores(self, name: str) -> Tensor:
        """Returns S of a layer's triplets, [r]."""
        P, E, Q = (self.sensitivity[key] * self.uncertainty[key] for key in (f"{name}.{part}" for part in _PARTS))
        return E.squeeze(1) + P.mean(0) + Q.mean(1)

    def largest(self, adapters: dict[str, AdaLoraAdapter], budget: int) -> dict[str, Tensor]:
        """Returns which triplets are among the `budget` of the largest S, bool [r] by layer."""
        scores = [self.scores(name) for name in adapters]
        every = torch.cat([score.to(scores[0].device) for score in scores])
        chosen = torch.zeros_like(every, dtype=torch.bool)
        chosen[every.argsort(descending=True, stable=True)[:budget]] = True
        return dict(zip(adapters, chosen.split([len(score) for score in scores]), strict=True))


@torch.no_grad()
def update_and_allocate(model: nn.Module, step: int, total_step: int | None = None) -> None:
    """Takes the gradients of an optimizer step into the importance of AdaLoRA's triplets, and allocates the ranks.

    To be called after each optimizer.step() and before the gradients are zeroed; AlignTrainer does. The gradients are
    those of the whole step, accumulated and averaged over processes, so that all processes allocate alike.

    Args:
        model: a model with adapters of architecture "adalora", wrapped by DDP or torch.compile or not.
        step: how many optimizer steps have been made, this one included: 1, 2, ...
        total_step: the steps of the whole training, where the option of this name is None.

    Raises:
        ValueError: adapters of another architecture, a step that is none, no total_step, or sharded parameters.
        RuntimeError: there are no gradients, or ranks are to be final and no step before told which triplets matter.
    """
    if not is_whole(step, 1, 10**9):
        raise ValueError(f"step={shown(step)}: count the optimizer steps that have been made, from 1 on")
    state, adapters = require_state(model), _adapters(model)
    config: Any = state.config
    schedule = _schedule(config, total_step, len(adapters))
    if step == 1 or state.ranks is None:  # a training begins
        state.ranks = TripletImportance()
    importance: TripletImportance = state.ranks
    if step <= schedule.end:
        importance.update(adapters, config.beta1, config.beta2)
    if step >= schedule.end and not importance.kept:
        _finish(importance, adapters, schedule, step)
    allocated = importance.largest(adapters, schedule.budget(step)) if schedule.allocates(step) else {}
    for name, mask in (importance.kept or allocated).items():
        E = adapters[name].lora_E
        E.masked_fill_(~mask[:, None].to(E.device), 0.0)


def rank_schedule(model: nn.Module, total_step: int | None = None) -> RankSchedule:
    """Returns the schedule of a model's ranks; total_step is as in update_and_allocate, and so is what is raised."""
    return _schedule(require_state(model).config, total_step, len(_adapters(model)))


def _schedule(config: AlignLoraConfig, total_step: int | None, layers: int) -> RankSchedule:
    total = config.total_step or total_step
    if total is None:
        raise ValueError("total_step=None: the schedule of the ranks is about all optimizer steps: say how many")
    return RankSchedule.of(config, total, layers)


def importance_like(model: nn.Module, *, final: bool) -> dict[str, Tensor]:
    """Returns tensors of the names and shapes of TripletImportance.to_tensors, after the last allocation or before."""
    adapters = _adapters(model)
    if final:
        return {f"kept/{name}": adapter.lora_E[:, 0] != 0 for name, adapter in adapters.items()}
    weights = {f"{name}.{part}": getattr(adapter, part) for name, adapter in adapters.items() for part in _PARTS}
    return {
        f"{average}/{name}": weight for average in ("sensitivity", "uncertainty") for name, weight in weights.items()
    }


def allocated_ranks(model: nn.Module) -> dict[str, int]:
    """Returns how many singular values of each adapted layer are not zero, by the layer's name in the plain model.

    Raises:
        ValueError: the model has no adapters of architecture "adalora", or its parameters are sharded.
    """
    return {name: adapter.kept_rank for name, adapter in _adapters(model).items()}


def _adapters(model: nn.Module) -> dict[str, AdaLoraAdapter]:
    model, config = unwrapped(model), require_state(model).config
    if config.architecture != "adalora":
        raise ValueError(f"architecture={config.architecture!r}: only the ranks of adalora are allocated")
    found: Any = {plain_name(model, name): layer.adapter for name, layer in adapted_layers(model).items()}
    if shard_ranks(p for adapter in found.values() for p in adapter.parameters()):
        raise ValueError("adalora compares whole matrices, of which processes hold parts here: train with DDP")
    return found


def _sensitivity(weight: Tensor) -> Tensor:
    """|w dL/dw|; zero for a weight that has no gradient, as of a layer that the step did not reach."""
    weight, gradient = at_least_float32(weight), weight.grad
    return torch.zeros_like(weight) if gradient is None else (weight * gradient).abs_()


def _finish(
    importance: TripletImportance, adapters: dict[str, AdaLoraAdapter], schedule: RankSchedule, step: int
) -> None:
    """Allocates for the last time."""
    if not importance.sensitivity:
        raise RuntimeError(
            f"step={step}: from step {schedule.end} on the ranks are final, and no step before has told which triplets "
            "matter: call update_and_allocate after every step, or go on from a checkpoint"
        )
    importance.kept = importance.largest(adapters, schedule.last)
    importance.sensitivity.clear()
    importance.uncertainty.clear()
