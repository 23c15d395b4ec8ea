"""The two opaque operators by which a layer meets its alignment step (docs/numerics.md, "Keyed injection").

A step is a Python object; a layer sees only its key, an int64 CPU tensor, and its own slot in the step, another.
Compilers and saved-tensor hooks may copy, save or offload both: only their values count.

    record_(stats!, z, ids, step, slot)      forward:  writes the moments of z into stats[slot]
    injected_dz(z, ids, step, slot) -> dz    backward: the gradient that the step's tables hold
"""

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from align_ext.ops import _native  # noqa: F401


class KeyedStep(Protocol):
    """What the operators need of a step."""

    def see(self, slot: int) -> None:
        """Notes that a layer ran; a second time is an error."""

    def tables_of(self, slot: int, rank: int) -> tuple[Tensor, Tensor] | None:
        """What a layer adds to dz while its loss is being differentiated, else None.

        Returns:
            d_align: scalar, the gradient that came in; it multiplies the tables.
            tables: a | b | mu [tasks, 3 rank] of the layer.
        """


_STEPS: "WeakValueDictionary[int, KeyedStep]" = WeakValueDictionary()
_KEYS = itertools.count(1)


def register_step(step: KeyedStep) -> Tensor:
    """Registers a step (weakly) and returns its key, an int64 scalar tensor on the CPU."""
    key = next(_KEYS)
    _STEPS[key] = step
    return torch.tensor(key, dtype=torch.int64, device="cpu")


def _token_ids(ids: Tensor, z: Tensor) -> Tensor:
    """Task ids of the rows of z: as they are, or each of [B] repeated over its S = T / B positions."""
    tokens, ids = z.shape[0], ids.to(z.device)
    if ids.numel() == tokens:
        return ids
    if ids.numel() == 0 or tokens % ids.numel():
        raise RuntimeError(
            f"task_ids holds {ids.numel()} ids, but an aligned layer saw {tokens} tokens: give one id per sample, "
            "[B], or one per token, [B, S], of a batch-first model all of whose adapted layers see the same tokens"
        )
    return ids.repeat_interleave(tokens // ids.numel())


_library = torch.library.Library("align_ext", "FRAGMENT")
_HOST_STATE = (torch.Tag.cudagraph_unsafe,)
_library.define("record_(Tensor(a!) stats, Tensor z, Tensor ids, Tensor step, Tensor slot) -> ()", tags=_HOST_STATE)
_library.define("injected_dz(Tensor z, Tensor ids, Tensor step, Tensor slot) -> Tensor", tags=_HOST_STATE)


def _record_(stats: Tensor, z: Tensor, ids: Tensor, step: Tensor, slot: Tensor) -> None:
    if torch._C._current_graph_task_id() != -1:
        return  # activation checkpointing recomputes the layer inside backward: recorded already
    index, rank, width = int(slot), z.shape[1], stats.shape[2] // 2
    _STEPS[int(step)].see(index)
    moments = torch.ops.align_ext.task_moments(z, _token_ids(ids, z), stats.shape[1])
    row = stats[index]  # n | mean | M2, the last two padded to the widest layer's rank
    row[:, : 1 + rank] = moments[:, : 1 + rank]
    row[:, 1 + width : 1 + width + rank] = moments[:, 1 + rank :]


def _injected_dz(z: Tensor, ids: Tensor, step: Tensor, slot: Tensor) -> Tensor:
    owner = _STEPS.get(int(step))
    if owner is None:
        raise RuntimeError(
            "backward reached an aligned layer, but its alignment step is gone: differentiate step.total(loss), "
            "or the loss of model(..., task_ids=ids), not a loss beside it"
        )
    armed = owner.tables_of(int(slot), z.shape[1])
    if armed is None:
        return torch.zeros_like(z)
    d_align, tables = (tensor.to(z.device) for tensor in armed)
    return torch.ops.align_ext.gaussian_kl_backward(d_align, z, _token_ids(ids, z), tables)


def _no_output(stats: Tensor, z: Tensor, ids: Tensor, step: Tensor, slot: Tensor) -> None:
    return None


_library.impl("record_", _record_, "CompositeExplicitAutograd")
_library.impl("injected_dz", _injected_dz, "CompositeExplicitAutograd")
torch.library.register_fake("align_ext::record_", _no_output)
torch.library.register_fake("align_ext::injected_dz", lambda z, ids, step, slot: torch.empty_like(z))
