"""Reads and writes the values of sharded parameters (FSDP2, ZeRO-3), of which each process holds a shard.

That needs every process that holds a shard: save_adapter, export_peft and load_adapter are then collective, which means
that each process must call them, in the same order. If only some processes call them, they raise an error after
SECONDS. One process writes the files, and all return when the files are complete.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align_ext.alignment.guards import check_model

SECONDS = 300.0  # how long processes wait for one another
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "DeepSpeedEngine": "module"}
_WRAPPERS["OptimizedModule"] = "_orig_mod"
_rounds: dict[tuple[int, ...], int] = {}  # how often these processes have waited for one another


def unwrapped(model: nn.Module) -> Any:
    """Returns the model inside DDP, a DeepSpeed engine or torch.compile, with its parameters sharded.

    Raises:
        ValueError: its parameters are flattened (FullyShardedDataParallel), so that names and shapes are lost.
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
            module.reshard()  # parameters that are still gathered after a forward are only copies
    return inner


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raises ValueError if a model is wrapped or its parameters are sharded.

    Args:
        model: the model.
        what: the name of the function that needs the plain model.
    """
    if unwrapped(model) is not model or shard_ranks(model.parameters()):
        raise ValueError(
            f"{what} changes the layers of a plain model in one process, but this one is wrapped or in parts "
            f"({type(model).__name__}): save_adapter(model, folder) here, then load_adapter into a plain base model"
        )


def shard_ranks(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Returns the ranks of the processes that hold shards of these tensors; none if no tensor is sharded."""
    ranks: set[int] = set()
    for tensor in tensors:
        if _is_dtensor(tensor):
            ranks.update(tensor.device_mesh.mesh.flatten().tolist())  # type: ignore[attr-defined]
        elif _is_zero3(tensor):
            ranks.update(dist.get_process_group_ranks(tensor.ds_process_group))  # type: ignore[attr-defined]
    return tuple(sorted(ranks)) if len(ranks) > 1 else ()


def full_shapes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns tensors of the full shapes on the meta device."""
    return {
        name: torch.empty(getattr(t, "ds_shape", t.shape), dtype=t.dtype, device="meta") for name, t in tensors.items()
    }


def full_values(tensors: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
    """Returns the full values of tensors on the CPU, in every process that holds shards.

    Args:
        tensors: the tensors by name, in the same order in all processes.
        what: the name of the function that reads them.

    Raises:
        RuntimeError: not all of these processes called it.
        ValueError: a tensor has no values (it is on the meta device).
    """
    if ranks := shard_ranks(tensors.values()):
        _wait_for_all(ranks, what)
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
def set_values(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], what: str) -> None:
    """Sets tensors to new values; each process writes its shards.

    Args:
        tensors: the tensors by name, in the same order in all processes.
        values: the full values by the same names.
        what: the name of the function that writes them.

    Raises:
        RuntimeError: not all processes that hold shards called it.
        ValueError: DeepSpeed's optimizer has copies of them, which would overwrite the new values at its next step.
    """
    for name, tensor in tensors.items():
        if hasattr(tensor, "_z3_optimizer") or hasattr(tensor, "_hp_mapping"):
            raise ValueError(
                f"DeepSpeed's optimizer has a copy of {name}, which it would write back: call {what} before "
                "deepspeed.initialize or accelerator.prepare"
            )
    if ranks := shard_ranks(tensors.values()):
        _wait_for_all(ranks, what)
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
def one_writer(ranks: tuple[int, ...]) -> Iterator[bool]:
    """Yields whether this process writes; the others wait at the end until it has written, and fail if it failed."""
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


def _wait_for_all(ranks: tuple[int, ...], what: str) -> None:
    """Waits until all these processes call the same function; no collective, which could match an unrelated one."""
    store, number = dist.distributed_c10d._get_default_store(), _rounds.get(ranks, 0) + 1
    keys = [f"align_ext/{ranks}/{number}/{rank}" for rank in ranks]
    own_key = keys[ranks.index(dist.get_rank())]
    store.set(own_key, what)
    try:
        store.wait(keys, timedelta(seconds=SECONDS))
    except RuntimeError as error:
        store.delete_key(own_key)
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
