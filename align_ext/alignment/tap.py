"""How a step's losses reach a layer: one autograd node behind each operator (docs/numerics.md, "The latent tap").

    y, z, w = operator(x, ...)          pure: tensors in, tensors out
    y = tap(y, z, w, step, layer)       forward: y as it is; backward: dz and dw are what the step has for this layer

The node knows the step by a number, not by a reference: a graph that outlives its step keeps no latents alive, and
compilers and saved-tensor hooks may copy, save or offload what carries the number.

A compiled graph knows numbers as int64 tensors on the CPU, and meets the step by two opaque operators:

    record_(written!, output_of_layer, step, layer, output)     copies the output: the graph may reuse its memory
    recorded_gradient(dy, like, step, layer, output)         pops the gradient in the output

output says which of the layer's: LATENT, z, or WEIGHTS, a router's w. `written` says that it is changed, so that
compilers neither drop nor reorder record_; it holds nothing. dy is there for its place in the graph: what backward
computes without what comes in, compilers move into forward.
"""

import itertools
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from align_ext.ops._autograd import apply_of

LATENT, WEIGHTS = 0, 1


class TappedStep(Protocol):
    """The part of a step that a tap uses."""

    number: int
    key: Tensor

    def record(self, layer: int, output_of_layer: Tensor, output: int) -> None:
        """Records an output of a layer that ran; a second time is an error."""

    def pop_gradient(self, layer: int, output: int) -> Tensor | None:
        """The gradient in an output while the step's loss is differentiated, the caller's own; else None."""


class TappedLayer(Protocol):
    """The part of an adapter that a tap uses: the layer's number in the model, also as a tensor."""

    layer: int | None
    layer_key: Tensor | None


_STEPS: WeakValueDictionary[int, TappedStep] = WeakValueDictionary()
_NUMBERS = itertools.count(1)


def register_step(step: TappedStep) -> int:
    """Registers a step (weakly) and returns its number."""
    number = next(_NUMBERS)
    _STEPS[number] = step
    return number


def as_key(number: int) -> Tensor:
    """A number as compiled graphs take it: an int would be a constant of the graph, and every other one a new graph."""
    return torch.scalar_tensor(number, dtype=torch.int64, device="cpu")


def tap(y: Tensor, z: Tensor, w: Tensor | None, step: TappedStep, adapter: TappedLayer) -> Tensor:
    """Returns y, behind which z and w have the gradients of the step.

    Args:
        y: output of a layer; not copied.
        z: its latents [T, r] or [T, N, r].
        w: its router's weights [T, G, N], if the step's losses are about them.
        step: the step that the layer runs in.
        adapter: the layer's.
    """
    if torch.compiler.is_compiling():
        return LatentTap.apply(y, z, w, step.key, adapter.layer_key)
    return _apply(y, z, w, step.number, adapter.layer)


class LatentTap(torch.autograd.Function):
    """The node: (y, z, w) -> y; dy -> (dy, dz, dw)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, w: Tensor | None, step: Any, layer: Any) -> Tensor:
        """Passes y on under another name: not as a view, which nobody could change in place."""
        ctx.has_weights = w is not None
        if isinstance(step, Tensor):
            ctx.save_for_backward(z, w, step, layer)
        else:
            ctx.numbers = step, layer
        return y.detach()

    @staticmethod
    def backward(ctx: Any, *dy: Tensor) -> tuple[Tensor | None, ...]:
        """Asks the step for dz and dw."""
        if torch.compiler.is_compiling():
            z, w, step, layer = ctx.saved_tensors
            ask = torch.ops.align_ext.recorded_gradient
            dw = ask(*dy, w, step, layer, WEIGHTS) if ctx.has_weights else None
            return *dy, ask(*dy, z, step, layer, LATENT), dw, None, None
        number, layer = ctx.numbers
        step = _step(number, "backward")
        dw = step.pop_gradient(layer, WEIGHTS) if ctx.has_weights else None
        return *dy, step.pop_gradient(layer, LATENT), dw, None, None


_apply = apply_of(LatentTap)


def _step(number: int, where: str) -> TappedStep:
    step = _STEPS.get(number)
    if step is None:
        raise RuntimeError(
            f"{where} reached an aligned layer, but its alignment step is gone: differentiate step.total(loss), "
            "or the loss of model(..., task_ids=ids), not a loss beside it"
        )
    return step


def _record_(written: Tensor, output_of_layer: Tensor, step: Tensor, layer: Tensor, output: int) -> None:
    _step(int(step), "forward").record(int(layer), output_of_layer.clone(), output)


def _recorded_gradient(dy: Tensor, like: Tensor, step: Tensor, layer: Tensor, output: int) -> Tensor:
    gradient = _step(int(step), "backward").pop_gradient(int(layer), output)
    return torch.zeros_like(like) if gradient is None else gradient


def _no_output(written: Tensor, output_of_layer: Tensor, step: Tensor, layer: Tensor, output: int) -> None:
    return None


_library = torch.library.Library("align_ext", "FRAGMENT")
_HOST_STATE = (torch.Tag.cudagraph_unsafe,)
_library.define(
    "record_(Tensor(a!) written, Tensor output_of_layer, Tensor step, Tensor layer, int output) -> ()", tags=_HOST_STATE
)
_library.define(
    "recorded_gradient(Tensor dy, Tensor like, Tensor step, Tensor layer, int output) -> Tensor", tags=_HOST_STATE
)
_library.impl("record_", _record_, "CompositeExplicitAutograd")
_library.impl("recorded_gradient", _recorded_gradient, "CompositeExplicitAutograd")
torch.library.register_fake("align_ext::record_", _no_output)
torch.library.register_fake("align_ext::recorded_gradient", lambda dy, like, *_: torch.empty_like(like))
