"""Saves and strictly loads the model's part of a Trainer's checkpoint: adapter folder, queue, importance of ranks."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from align_ext.alignment.model_state import AlignState, find_state
from align_ext.base_model.sharded import shard_ranks
from align_ext.io.save_adapter import save_adapter
from align_ext.losses.statistics import STATISTICS, Statistics
from align_ext.model.load_adapter import load_adapter
from align_ext.model.rank_allocation import TripletImportance, importance_like
from align_ext.system.messages import reason_of, shown_path
from align_ext.system.reading import exists
from align_ext.system.tensors import check_tensors, read_tensors, write_tensors

QUEUE, RANKS = "align_queue.safetensors", "align_ranks.safetensors"


def save_trained(model: nn.Module, folder: str | Path, task_names: Sequence[str] = ()) -> None:
    """Saves the trained tensors by save_adapter, the queue of the last micro-batches' statistics, and AdaLoRA's scores.

    Args:
        model: a model with adapters.
        folder: the folder, which is made if it does not exist.
        task_names: as in save_adapter.
    """
    save_adapter(model, folder, task_names)
    if _allocates(model):
        write_tensors(Path(folder, RANKS), (_state(model).ranks or TripletImportance()).to_tensors())
    ranks = shard_ranks(model.parameters())
    if (queue := _state(model).queue) and (not ranks or torch.distributed.get_rank() == ranks[0]):
        states = (t.to_tensors().items() for t in queue)
        write_tensors(Path(folder, QUEUE), {f"{i}.{name}": x for i, items in enumerate(states) for name, x in items})


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Loads what save_trained saved into a model with the same kind of adapters.

    Raises:
        ValueError: as in load_adapter, or the folder holds other parameters than those that are trained.
    """
    queue, importance = _read_queue(model, folder), _read_importance(model, folder)
    load_adapter(model, folder)
    _set_queue(model, queue)
    _state(model).ranks = importance


def load_queue(model: nn.Module, folder: str | Path) -> None:
    """Loads only the queue, for Trainers that load the parameters themselves.

    Raises:
        ValueError: the queue's file is damaged.
    """
    _set_queue(model, _read_queue(model, folder))


def _set_queue(model: nn.Module, queue: list[Statistics]) -> None:
    _state(model).queue.clear()
    _state(model).queue.extend(queue)


def _read_queue(model: nn.Module, folder: str | Path) -> list[Statistics]:
    state, file, device = _state(model), Path(folder, QUEUE), next(model.parameters()).device
    entries: dict[int, dict[str, Tensor]] = {}
    try:
        for key, tensor in (read_tensors(file, empty=True)[0] if exists(file) else {}).items():
            number, _, name = key.partition(".")
            entries.setdefault(int(number), {})[name] = tensor.to(device)
        statistics = STATISTICS[state.config.align or "kl"]
        return [statistics.from_tensors(tensors) for _, tensors in sorted(entries.items())]
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{shown_path(file)} is damaged: {reason_of(error)}") from error


def _allocates(model: nn.Module) -> bool:
    return _state(model).config.architecture == "adalora"


def _read_importance(model: nn.Module, folder: str | Path) -> TripletImportance | None:
    if not _allocates(model):
        return None
    file, device, importance = Path(folder, RANKS), next(model.parameters()).device, TripletImportance()
    if not exists(file):
        raise ValueError(f"{shown_path(file)} is missing, which says what the ranks of adalora are decided by")
    tensors, _ = read_tensors(file, empty=True)
    expected = importance_like(model, final=any(key.startswith("kept/") for key in tensors)) if tensors else {}
    try:
        check_tensors(tensors, expected)
    except ValueError as error:
        raise ValueError(f"{shown_path(file)} is damaged: {reason_of(error)}") from error
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        getattr(importance, part)[name] = tensor.to(device)
    return importance


def _state(model: nn.Module) -> AlignState:
    state = find_state(model)
    assert state is not None
    return state
