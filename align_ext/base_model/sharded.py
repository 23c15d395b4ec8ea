"""Parameters in parts: FSDP2's and ZeRO-3's, each process holding some. Whoever reads or writes values does it here.

Reading or writing parts needs every process that holds some: save_adapter, export_peft and load_adapter are then
collective, which means that each process calls them, in the same order. A process that calls alone gets an error after
SECONDS. One process writes the files, and all return when they are whole.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align_ext.alignment.guards import check_model

SECONDS = 300.0  # that processes wait for one another
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "DeepSpeedEngine": "module"}
_WRAPPERS["OptimizedModule"] = "_orig_mod"
_rounds: dict[tuple[int, ...], int] = {}  # how often these processes met


def unwrapped(model: nn.Module) -> Any:
    """The model inside DDP, a DeepSpeed engine or torch.compile, its parameters as they are between steps.

    Raises:
        ValueError: its parameters are flattened (FullyShardedDataParallel), so that no name and shape is left.
    """
    check_model(model)
    inner: Any = model
    while name := _WRAPPERS.get(type(inner).__name__):
        inner = getattr(inner, name)
    for module in inner.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise ValueError(
                "FullyShardedDataParallel flattens the parameters: use FSDP2 (fully_shard; in accelerate and "
                'transformers "fsdp_version": 2)'
            )
        if hasattr(module, "reshard") and hasattr(module, "unshard"):
            module.reshard()  # what a forward left whole is a copy of the parts
    return inner


def refuse_parts(model: nn.Module, what: str) -> None:
    """Raises ValueError if a model is wrapped, or its parameters are in parts.

    Args:
        model: the model.
        what: the name of the function that needs it whole.
    """
    if unwrapped(model) is not model or holders(model.parameters()):
        raise ValueError(
            f"{what} changes the layers of a plain model in one process, but this one is wrapped or in parts "
            f"({type(model).__name__}): save_adapter(model, folder) here, then load_adapter into a plain base model"
        )


def holders(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """The processes that hold parts of these tensors; none if all are whole."""
    ranks: set[int] = set()
    for tensor in tensors:
        if _is_dtensor(tensor):
            ranks.update(tensor.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
        elif _is_zero3(tensor):
            ranks.update(dist.get_process_group_ranks(tensor.ds_process_group))  # type: ignore[attr-defined]
    return tuple(sorted(ranks)) if len(ranks) > 1 else ()


def outlines(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without values, of the whole shapes."""
    return {
        name: torch.empty(getattr(t, "ds_shape", t.shape), dtype=t.dtype, device="meta") for name, t in tensors.items()
    }


def whole(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """The values of tensors, whole and on the CPU; all processes that hold parts get them.

    Args:
        tensors: by name; in the same order in all processes.
        what: the name of the function that reads them.

    Raises:
        RuntimeError: not all of these processes called it.
        ValueError: a tensor has no values (it is on the meta device).
    """
    if ranks := holders(tensors.values()):
        _meet(ranks, what)
    result = {}
    for name, tensor in tensors.items():
        value = tensor.detach()
        if _is_dtensor(tensor):
            value = tensor.full_tensor().detach()  # type: ignore[attr-defined]
        elif _is_zero3(tensor):
            with _gathered([tensor]):
                value = tensor.detach().clone()
        if value.is_meta:
            raise ValueError(f"{name} is on the meta device, where it has no values: load the model without offloading")
        result[name] = value.cpu()
    return result


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Gives tensors new values, each process its parts.

    Args:
        tensors: by name; in the same order in all processes.
        values: whole, by the same names.
        what: the name of the function that writes them.

    Raises:
        RuntimeError: not all processes that hold parts called it.
        ValueError: DeepSpeed's optimizer has copies of them, which would come back at its next step.
    """
    for name, tensor in tensors.items():
        if hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"):
            raise ValueError(
                f"DeepSpeed's optimizer has a copy of {name}, which it would write back: call {what} before "
                "deepspeed.initialize or accelerator.prepare"
            )
    if ranks := holders(tensors.values()):
        _meet(ranks, what)
    for name, tensor in tensors.items():
        if _is_dtensor(tensor):
            from torch.distributed.tensor import distribute_tensor

            value = values[name].to(tensor.device, tensor.dtype)
            tensor.copy_(distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None))  # type: ignore[attr-defined]
        elif _is_zero3(tensor):
            with _gathered([tensor], modifier_rank=ranks[0] if ranks else 0):
                tensor.copy_(values[name])
        else:
            tensor.copy_(values[name])


@contextlib.contextmanager
def one_writes(ranks: tuple[int, ...]) -> Iterator[bool]:
    """Whether this process is the one that writes; the others wait at the end until it has, and fail if it did."""
    if not ranks:
        yield True
        return
    store, key = dist.distributed_c10d._get_default_store(), f"align_ext/{ranks}/{_rounds[ranks]}/written"
    if dist.get_rank() == ranks[0]:
        try:
            yield True
        except BaseException as error:
            store.set(key, f"{type(error).__name__}: {error}")
            raise
        store.set(key, "")
        return
    yield False
    store.wait([key], timedelta(seconds=12 * SECONDS))
    if reason := store.get(key).decode():
        raise RuntimeError(f"process {ranks[0]} could not write: {reason}")


def _meet(ranks: tuple[int, ...], what: str) -> None:
    """Waits until all of these processes are here, for the same thing; not by a collective, which might meet others."""
    store, number = dist.distributed_c10d._get_default_store(), _rounds.get(ranks, 0) + 1
    keys = [f"align_ext/{ranks}/{number}/{rank}" for rank in ranks]
    mine = keys[ranks.index(dist.get_rank())]
    store.set(mine, what)
    try:
        store.wait(keys, timedelta(seconds=SECONDS))
    except RuntimeError as error:
        store.delete_key(mine)
        raise RuntimeError(
            f"{what} needs all {len(ranks)} processes, since each holds a part of the parameters, but not all called "
            f"it within {SECONDS:g} s: call it in every process, not in one alone"
        ) from error
    _rounds[ranks] = number
    for rank, key in zip(ranks, keys, strict=True):
        if (other := store.get(key).decode()) != what:
            raise RuntimeError(f"{what} was called here, but {other} in process {rank}: call the same in every process")


def _is_dtensor(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _is_zero3(tensor: Tensor) -> bool:
    return hasattr(tensor, "ds_id") and hasattr(tensor, "ds_status")


def _gathered(tensors: list[Tensor], modifier_rank: int | None = None) -> Any:
    import deepspeed

    return deepspeed.zero.GatheredParameters(tensors, modifier_rank=modifier_rank)
