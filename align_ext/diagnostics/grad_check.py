"""Checks that the alignment loss reaches every adapted layer, for a model, a batch and a training loop.

    report = grad_check(model, batch)                    # loss = model(**batch).loss; loss.backward()
    report = grad_check(model, batch, my_loop)           # my_loop(model, batch): forward and backward, no optimizer
    print(report)

A loss may have a logged value but no gradient. So for each layer, the gradient with the loss's weight minus the
gradient without it is compared with the finite difference of the loss's value, which needs no backward pass.
"""

import functools
import statistics
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.capture import adapters_of
from align_ext.alignment.model_state import AlignState, find_state
from align_ext.diagnostics.observe import Observer, cause_of_zero, is_ours
from align_ext.system.terminal import print_table

Loop = Callable[[nn.Module, Any], Any]
# By dtype: the step of finite differences relative to a parameter's norm, and the allowed relative gradient error.
_PRECISION = {torch.float64: (1e-3, 0.02), torch.float32: (1e-2, 0.1)}
_LOW_PRECISION = (3e-2, 0.5)
_MAX_DOUBLES = 300_000_000
_SEED = 0
_UNKNOWN = (
    "backward reached the layer, but not what the step had for it: recompute by the model's own "
    "gradient_checkpointing_enable(), or by checkpoint(..., use_reentrant=False)"
)


@dataclass(frozen=True)
class Reach:
    """The effect of one loss on one layer.

    Attributes:
        layer: module name.
        loss: "align", "balance", or "loss" for the model's loss.
        gradient: the norm of the gradient that the loss adds to lora_A ("balance": the router, "loss": lora_B).
        expected: the finite difference along the gradient; None: not computed.
        verdict: "ok", "none" (no gradient), "wrong" (not the finite difference), "stationary" (no gradient, rightly,
            since the loss does not change either).
        cause: the likely cause and its cure; empty if there is no problem.
    """

    layer: str
    loss: str
    gradient: float
    expected: float | None
    verdict: str
    cause: str = ""

    @property
    def reached(self) -> bool:
        """Whether the layer gets the right gradient."""
        return self.verdict in ("ok", "stationary")


@dataclass(frozen=True)
class GradReport:
    """The results for all layers.

    Attributes:
        layers: one entry per layer and loss.
        scale: for each loss, the loop's factor on it (loss scaling, accumulation): the median over the layers.
    """

    layers: list[Reach]
    scale: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether every layer gets its gradient."""
        return all(layer.reached for layer in self.layers)

    def __str__(self) -> str:
        lines = [f"{loss}: multiplied by {scale:.4g}" for loss, scale in self.scale.items() if abs(scale - 1) > 0.02]
        lines += [f"{x.layer}: {x.loss}: {x.verdict}: {x.cause}" for x in self.layers if not x.reached]
        reached = sum(layer.reached for layer in self.layers)
        return "\n".join([f"{reached} of {len(self.layers)} layers get their gradient", *lines])


def grad_check(model: nn.Module, batch: Any, loop: Loop | None = None, *, differences: int = 16) -> GradReport:
    """Compares the gradient that a loss adds to each layer with finite differences of the loss.

        D = gradient(weight) - gradient(0),   V = D / ||D||
        D · V  against  weight * (loss(P + h V) - loss(P - h V)) / 2h

    with P = lora_A for the alignment, the router for the balance loss and, without alignment, lora_B for the model's
    loss. It uses float64 if the model is on the CPU and small enough. The model and its gradients are restored.

    Args:
        model: a model with adapters, in the mode and wrapping of its training.
        batch: the batch for the loop.
        loop: forward and backward of one batch, loop(model, batch), without optimizer.step() and zero_grad(); may
            return the loss. None: loss = model(**batch).loss; loss.backward().
        differences: the number of layers with finite differences (two runs of the loop each): first layers without a
            gradient, then evenly spaced ones. With top_k there are none, since the choice of heads is not continuous.

    Returns:
        The gradient of every layer, with the likely cause if there is none.

    Raises:
        ValueError: the model has no adapters, or the loop changed the parameters.
    """
    state, adapters = find_state(model), adapters_of(model)
    assert state is not None
    layers: list[Reach] = []
    scale = {}
    with _restored(model, state), _in_float64(model) as dtype, Observer(adapters, state) as observer:
        for loss in _losses(state):
            probe = _Probe(model, observer, lambda: (loop or one_step)(model, _convert_floats(batch, dtype)), loss)
            reaches, scale[loss] = probe.check(differences, dtype)
            layers += reaches
    return GradReport(layers, scale)


def one_step(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Runs the default loop: forward and backward."""
    loss = model(**batch).loss
    loss.backward()
    return loss


def print_reports(reports: Mapping[str, GradReport], console: Console) -> None:
    """Prints a table with one row per report and loss, and below it the problems."""
    table = Table("model", "loss", "layers", "largest error", "verdict", title="what reaches the adapters")
    for name, report in reports.items():
        for loss, scale in report.scale.items():
            layers = [layer for layer in report.layers if layer.loss == loss]
            errors = [
                abs(x.gradient - scale * x.expected) / x.gradient
                for x in layers
                if x.expected is not None and x.verdict == "ok"
            ]
            reached = sum(layer.reached for layer in layers)
            verdict = Text("ok", "green") if reached == len(layers) else Text("not reached", "red")
            table.add_row(name, loss, f"{reached}/{len(layers)}", f"{max(errors):.0e}" if errors else "-", verdict)
    print_table(console, table)
    for name, report in reports.items():
        if not report.ok:
            console.print(Text.assemble((name, "red"), f": {report}"))


def _losses(state: AlignState) -> list[str]:
    config = state.config
    return ["align" if config.align else "loss"] + ["balance"] * bool(config.balance)


def _parameter(loss: str, adapter: Any) -> nn.Parameter:
    if loss == "balance":
        return adapter.lora_router.lora_R
    return adapter.lora_A if loss == "align" else adapter.lora_B


class _Probe:
    """Runs the loop several times with changes only in the weight of one loss, or in one parameter."""

    def __init__(self, model: nn.Module, observer: Observer, loop: Callable[[], Any], loss: str) -> None:
        self.model, self.observer, self.loop, self.loss = model, observer, loop, loss
        # Of the layers of a block of experts one has the router.
        self.parameters = {
            name: _parameter(loss, adapter)
            for name, adapter in observer.adapters.items()
            if loss != "balance" or getattr(adapter, "lora_router", None) is not None
        }
        self.buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        self.weight = 1.0 if loss == "loss" else getattr(observer.state.config, f"{loss}_weight") or 1.0

    def check(self, differences: int, dtype: torch.dtype) -> tuple[list[Reach], float]:
        """Returns the layers' entries, and the loop's factor on the loss."""
        try:
            added = self.added()
        except RuntimeError as error:
            if not is_ours(error):
                raise
            return [Reach(name, self.loss, 0.0, None, "none", str(error)) for name in self.parameters], 1.0
        causes = {name: cause_of_zero(self.observer, name, p, self.loss) for name, p in self.parameters.items()}
        if self.loss == "align" and self.observer.hold_bandwidths():
            added = self.added()
        step, tolerance = _PRECISION.get(dtype, _LOW_PRECISION)
        chosen = _select_layers(added, 0 if self.observer.state.config.top_k else differences)
        slopes = {name: self.slope(name, added[name], step) for name in chosen}
        return _judge(self.loss, added, slopes, causes, tolerance)

    def run(self, weight: float) -> tuple[dict[str, Tensor | None], float | None]:
        """Returns the gradients and the loss's value, with the same random numbers and buffers each time."""
        for buffer, value in self.buffers:
            buffer.copy_(value)
        self.model.zero_grad(set_to_none=True)
        if self.loss != "loss":
            self.observer.reweigh(self.loss, weight)
        self.observer.steps.clear()
        versions = [p._version for p in self.parameters.values()]
        with torch.random.fork_rng():  # restores the state, so that every run has the same dropout
            returned = self.loop()
        if versions != [p._version for p in self.parameters.values()]:
            raise ValueError("the loop changed the adapters: leave optimizer.step() out of it")
        grads = {name: None if p.grad is None else p.grad.detach().clone() for name, p in self.parameters.items()}
        return grads, self.observer.value(self.loss, returned)

    def added(self) -> dict[str, Tensor]:
        """Returns what the loss adds to each gradient; exactly zero if it is smaller than rounding errors."""
        off = {} if self.loss == "loss" else self.run(0.0)[0]
        on = self.run(self.weight)[0]
        result = {}
        for name, p in self.parameters.items():
            with_loss, without = (torch.zeros_like(p) if g is None else g for g in (on[name], off.get(name)))
            difference = with_loss - without
            noise = 8 * torch.finfo(p.dtype).eps * (with_loss.norm() + without.norm())
            result[name] = difference if difference.norm() > noise or not off else torch.zeros_like(p)
        return result

    @torch.no_grad()
    def slope(self, name: str, added: Tensor, step: float) -> tuple[float, bool] | None:
        """Returns the finite difference along the gradient (or a random direction), and whether the loss is flat.

        The loss is flat if the even part of the change is as large as the odd part: at a minimum, or for a constant.
        """
        p = self.parameters[name]
        direction = added
        if not added.any():
            generator = torch.Generator().manual_seed(_SEED)
            direction = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        direction = direction / direction.norm()
        h = step * (float(p.norm()) or 1.0)
        originals, values = p.clone(), []
        for offset in (h, -h) if added.any() else (h, -h, 0.0):
            p.copy_(originals + offset * direction)
            with torch.enable_grad():
                values.append(self.run(self.weight)[1])
        p.copy_(originals)
        if None in values:
            return None
        up, down, *center = (self.weight * float(value or 0.0) for value in values)
        return (up - down) / (2 * h), bool(center) and abs(up - down) <= abs(up + down - 2 * center[0])


def _select_layers(added: Mapping[str, Tensor], count: int) -> list[str]:
    """Returns layers without a gradient first, then evenly spaced other layers."""
    zero = [name for name, tensor in added.items() if not tensor.any()][:count]
    others = [name for name, tensor in added.items() if tensor.any()]
    count_of_others = min(max(count - len(zero), 0), len(others))
    return zero + [others[i * len(others) // count_of_others] for i in range(count_of_others)]


def _judge(
    loss: str,
    added: Mapping[str, Tensor],
    slopes: Mapping[str, tuple[float, bool] | None],
    causes: Mapping[str, str],
    tolerance: float,
) -> tuple[list[Reach], float]:
    """Returns the verdict on each layer, and the loop's factor."""
    norms = {name: float(tensor.norm()) for name, tensor in added.items()}
    known = {name: slope for name, slope in slopes.items() if slope is not None}
    ratios = [norms[name] / slope for name, (slope, _) in known.items() if norms[name] and slope]
    scale = statistics.median(ratios) if ratios else 1.0
    cut = "the path to it is cut at the layers without a gradient: mend those first"
    partly = "a part of its path to the loss is cut (detach, no_grad), or the loop is not the same twice"
    layers = []
    for name, norm in norms.items():
        expected, flat = known.get(name, (None, False))
        verdict, cause = "ok", ""
        if norm == 0:
            flat = (flat or expected is None) and not causes[name]
            verdict = "stationary" if flat and loss != "align" else "none"
            cause = "" if verdict == "stationary" else causes[name] or _UNKNOWN
        elif expected is not None and abs(norm - scale * expected) > tolerance * norm:
            verdict, cause = "wrong", cut if min(norms.values()) == 0 else partly
        layers.append(Reach(name, loss, norm, expected, verdict, cause))
    return layers, scale


@contextmanager
def _restored(model: nn.Module, state: AlignState) -> Iterator[None]:
    """Restores gradients, buffers, options and the last step at the end, and suppresses warnings."""
    grads = [(p, p.grad) for p in model.parameters()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    config, last = state.config, state.last
    # The projectors of the spectral loss are constants for its gradient, but would change in finite differences.
    state.config = replace(config, spectral_weight=0.0)
    try:
        with warnings.catch_warnings(), _norms_held(model):
            warnings.simplefilter("ignore")
            yield
    finally:
        state.config, state.last = config, last
        for buffer, value in buffers:
            buffer.copy_(value)
        for p, grad in grads:
            p.grad = grad


@contextmanager
def _norms_held(model: nn.Module) -> Iterator[None]:
    """Keeps the norms of DoRA, which are constants to the gradient, as the first forward in the block has them."""
    layers: list[Any] = [
        layer for layer in adapted_layers(model).values() if layer.adapter.lora_magnitude_vector is not None
    ]
    for layer in layers:
        vars(layer)["row_norms"] = functools.cache(layer.row_norms)
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["row_norms"]


@contextmanager
def _in_float64(model: nn.Module) -> Iterator[torch.dtype]:
    """Converts a small model on the CPU to float64 within the block; yields the dtype of the model."""
    tensors = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()]
    plain = all(type(t) in (nn.Parameter, Tensor) and t.device.type == "cpu" for t in tensors)
    if not plain or sum(t.numel() for t in tensors) > _MAX_DOUBLES:
        yield min((t.dtype for t in tensors), key=lambda dtype: dtype.itemsize)
        return
    originals = [(t, t.data) for t in tensors]
    try:
        for t, data in originals:
            t.grad = None
            t.data = data.double()
        yield torch.float64
    finally:
        for t, data in originals:
            t.grad = None
            t.data = data


def _convert_floats(batch: Any, dtype: torch.dtype) -> Any:
    """Returns a batch whose floating-point tensors have the model's dtype."""
    if isinstance(batch, Mapping):
        return {name: _convert_floats(value, dtype) for name, value in batch.items()}
    if isinstance(batch, Tensor) and batch.is_floating_point() and dtype == torch.float64:
        return batch.to(dtype)
    return batch
