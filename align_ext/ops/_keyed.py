"""The two opaque operators by which a compiled layer meets its alignment step (docs/numerics.md, "Keyed injection").

A step is a Python object; a layer sees only its key, an int64 CPU tensor, and its own slot in the step, another.
Compilers and saved-tensor hooks may copy, save or offload both: only their values count.

    keep_(door!, z, step, slot, output)       forward:  hands a copy of z to the step; compiled graphs only
    injected(z, step, slot, output) -> dz     backward: the gradient that the step has for this layer, given away

output says which of the layer's: LATENT, z, or WEIGHTS, a router's w. `door` is written so that compilers neither drop
nor reorder keep_; it holds nothing. keep_ copies, for a compiled graph may reuse the memory of z; in eager mode the
layer hands z itself to Step.keep.
"""

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from align_ext.ops import _native  # noqa: F401

LATENT, WEIGHTS = 0, 1


class KeyedStep(Protocol):
    """What the operators need of a step."""

    def receive(self, slot: int, z: Tensor, output: int) -> None:
        """Keeps an output of a layer that ran; a second time is an error."""

    def take(self, slot: int, output: int) -> Tensor | None:
        """What a layer adds to dz while its loss is being differentiated, the caller's own; else None."""


_STEPS: "WeakValueDictionary[int, KeyedStep]" = WeakValueDictionary()
_KEYS = itertools.count(1)


def register_step(step: KeyedStep) -> Tensor:
    """Registers a step (weakly) and returns its key, an int64 scalar tensor on the CPU."""
    key = next(_KEYS)
    _STEPS[key] = step
    return torch.scalar_tensor(key, dtype=torch.int64, device="cpu")


_library = torch.library.Library("align_ext", "FRAGMENT")
_HOST_STATE = (torch.Tag.cudagraph_unsafe,)
_library.define("keep_(Tensor(a!) door, Tensor z, Tensor step, Tensor slot, int output) -> ()", tags=_HOST_STATE)
_library.define("injected(Tensor z, Tensor step, Tensor slot, int output) -> Tensor", tags=_HOST_STATE)


def slot_of(slot: Tensor) -> int:
    """The number in a slot; its shape says whether the step deals with the routing weights too ([2]) or not ([])."""
    number = slot.tolist()
    return number[0] if isinstance(number, list) else number


def _owner(step: Tensor, where: str) -> KeyedStep:
    owner = _STEPS.get(int(step))
    if owner is None:
        raise RuntimeError(
            f"{where} reached an aligned layer, but its alignment step is gone: differentiate step.total(loss), "
            "or the loss of model(..., task_ids=ids), not a loss beside it"
        )
    return owner


def _keep_(door: Tensor, z: Tensor, step: Tensor, slot: Tensor, output: int) -> None:
    _owner(step, "forward").receive(slot_of(slot), z.clone(), output)


def injected(z: Tensor, step: Tensor, slot: Tensor, output: int) -> Tensor:
    """The operator; in eager mode called as it is."""
    dz = _owner(step, "backward").take(slot_of(slot), output)
    return torch.zeros_like(z) if dz is None else dz


def _no_output(door: Tensor, z: Tensor, step: Tensor, slot: Tensor, output: int) -> None:
    return None


_library.impl("keep_", _keep_, "CompositeExplicitAutograd")
_library.impl("injected", injected, "CompositeExplicitAutograd")
torch.library.register_fake("align_ext::keep_", _no_output)
torch.library.register_fake("align_ext::injected", lambda z, step, slot, output: torch.empty_like(z))
