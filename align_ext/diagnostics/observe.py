"""Observes each adapter while a training loop runs, to explain why it gets no gradient."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import Self

from align_ext.adapters.base import Adapter
from align_ext.alignment.model_state import AlignState
from align_ext.alignment.step import AlignStep
from align_ext.losses.mmd import MmdStatistics


@dataclass
class Seen:
    """Observations of one layer: whether its forward ran, had an autograd graph, and got a gradient."""

    ran: bool = False
    graph: bool = False
    reached: bool = False


class Observer:
    """Observes a model's adapters by hooks within a with block.

    Args:
        adapters: the adapters by layer name.
        state: the model's state, whose options the observer changes.
    """

    def __init__(self, adapters: Mapping[str, Adapter], state: AlignState) -> None:
        self.adapters, self.state = adapters, state
        self.seen = {name: Seen() for name in adapters}
        self.steps: list[AlignStep] = []  # the steps of the last run, which clears the list first
        self.weight: float | None = None
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for name, adapter in self.adapters.items():
            self._handles.append(adapter.register_forward_hook(self._hook(self.seen[name])))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, seen: Seen) -> Any:
        def on_gradient(gradient: Tensor) -> None:
            seen.reached |= bool(gradient.any())

        def on_forward(module: nn.Module, args: Any, y: Tensor) -> None:
            seen.ran = True
            step = self.state.current
            if step is not None and step not in self.steps:
                self.steps.append(step)
            if y.requires_grad:
                seen.graph = True
                y.register_hook(on_gradient)

        return on_forward

    def reweigh(self, loss: str, weight: float) -> None:
        """Sets the weight of a loss for the next runs."""
        options: dict[str, Any] = {f"{loss}_weight": weight}
        self.state.config = replace(self.state.config, **options)
        self.weight = weight

    def value(self, loss: str, returned: Any) -> float | None:
        """Returns the loss's value in the last run, without its weight; None if there is none."""
        if loss == "loss":
            return None if returned is None else float(returned)
        parts = [step.alignment if loss == "align" else step.balance for step in self.steps]
        return sum(float(part.value) for part in parts if part is not None) if any(parts) else None

    def hold_bandwidths(self) -> bool:
        """Fixes the MMD's bandwidths by the mean squared distance of the last run; returns whether it did.

        Heuristic bandwidths are constants for the gradient, but would change in finite differences.
        """
        config = self.state.config
        part = self.steps[-1].alignment if self.steps else None
        if part is None or not isinstance(part.statistics, MmdStatistics) or config.mmd_bandwidths is not None:
            return False
        rows = part.statistics.rows.values()
        distance = sum(2 * float(z.var(1).sum(-1).mean()) for z in rows) / len(rows)
        self.state.config = replace(config, mmd_bandwidths=tuple(distance * 4.0**k for k in range(-3, 4)))
        return True


def is_ours(error: BaseException) -> bool:
    """Whether this package raised an error, so that its message explains the problem."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("align_ext.")


def cause_of_zero(observer: Observer, name: str, parameter: nn.Parameter, loss: str) -> str:
    """Returns why a layer gets no gradient from a loss, with the cure, in one line; "" if no cause is known."""
    seen, steps = observer.seen[name], observer.steps
    if not parameter.requires_grad:
        return "the parameter is frozen: call requires_grad_(True) on it before the optimizer is made"
    if not seen.ran:
        return "the forward never runs it: leave it out by exclude_modules, or undo what bypasses it"
    if not seen.graph:
        return (
            "it runs without a graph: under no_grad, or in a reentrant checkpoint whose input needs no gradient; call "
            "model.enable_input_require_grads(), or use use_reentrant=False"
        )
    if loss != "loss" and (reason := _problem_of_steps(steps, observer.weight, loss)):
        return reason
    if not seen.reached:
        return "its output is detached, or the loss does not depend on it: find the detach() or no_grad() after it"
    if parameter.grad is None:
        return "the loop cleared the gradients: leave zero_grad() out after backward"
    return ""


def _problem_of_steps(steps: list[AlignStep], weight: float | None, loss: str) -> str:
    """Returns a problem of the loop's steps that affects all layers, or ""."""
    if not steps:
        return "the loop opens no training step: call model.train(), and give task_ids= or use align_step"
    step = steps[-1]
    if not step.is_differentiated:
        return "the loop differentiates a loss beside the step's: call step.total(loss).backward()"
    if loss != "align":
        return ""
    if step._weight != weight:
        return f"the loop gives step.total a weight of its own, {step._weight:g}: leave it out while checking"
    if step.alignment is None or float(step.alignment.value) != 0.0:
        return ""
    tasks = torch.unique(step.tokens.ids[step.tokens.ids >= 0]).tolist()
    found = f"of task {tasks[0]} alone" if len(tasks) == 1 else f"of tasks {tasks}" if tasks else "of no task (ids -1)"
    return f"the batch's tokens are {found}: mix tasks in a batch, two tokens of each at least"
