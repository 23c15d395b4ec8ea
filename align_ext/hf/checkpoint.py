"""What a Trainer's checkpoint holds of the model: an adapter folder, and the queue; read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from align_ext.hf.export import load_adapter, save_adapter
from align_ext.hf.sharded import holders
from align_ext.hf.tensors import write_tensors
from align_ext.state import STATISTICS, AlignState, find_state

QUEUE = "align_queue.safetensors"


def save_trained(model: nn.Module, folder: str | Path, task_names: Sequence[str] = ()) -> None:
    """Writes what is trained as save_adapter does, and the queue of the last micro-batches' statistics.

    Args:
        model: with adapters.
        folder: made if it is not there.
        task_names: as for save_adapter.
    """
    save_adapter(model, folder, task_names)
    ranks = holders(model.parameters())
    if (queue := _state(model).queue) and (not ranks or torch.distributed.get_rank() == ranks[0]):
        named = (t.to_tensors().items() for t in queue)
        write_tensors(Path(folder, QUEUE), {f"{i}.{name}": x for i, items in enumerate(named) for name, x in items})


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Reads what save_trained wrote into a model adapted alike.

    Raises:
        ValueError: as for load_adapter; or other parameters are trained than those in the folder.
    """
    load_adapter(model, folder)
    _load_queue(_state(model), Path(folder, QUEUE), next(model.parameters()).device)


def _load_queue(state: AlignState, file: Path, device: torch.device) -> None:
    state.queue.clear()
    parts: dict[int, dict[str, Tensor]] = {}
    for key, tensor in (load_file(file) if file.is_file() else {}).items():
        number, _, name = key.partition(".")
        parts.setdefault(int(number), {})[name] = tensor.to(device)
    for _, tensors in sorted(parts.items()):
        state.queue.append(STATISTICS[state.config.align or "kl"].from_tensors(tensors))


def _state(model: nn.Module) -> AlignState:
    state = find_state(model)
    assert state is not None
    return state
