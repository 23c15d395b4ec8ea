"""What a Trainer's checkpoint holds of the model: adapters, what else is trained, the queue; read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from align_ext.hf.export import load_adapter, save_adapter
from align_ext.hf.folder import check_tensors, write_tensors
from align_ext.hf.replace import adapted_layers
from align_ext.state import STATISTICS, AlignState, find_state

OTHERS, QUEUE = "align_trained.safetensors", "align_queue.safetensors"


def save_trained(model: nn.Module, folder: str | Path, task_names: Sequence[str] = ()) -> None:
    """Writes the adapters as save_adapter does, and align_trained.safetensors where other parameters are trained too.

    Args:
        model: with adapters.
        folder: made if it is not there.
        task_names: as for save_adapter.
    """
    save_adapter(model, folder, task_names)
    if others := _others(model):
        write_tensors(Path(folder, OTHERS), others)
    if queue := _state(model).queue:
        named = (t.to_tensors().items() for t in queue)
        write_tensors(Path(folder, QUEUE), {f"{i}.{name}": x for i, items in enumerate(named) for name, x in items})


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Reads what save_trained wrote into a model adapted alike.

    Raises:
        ValueError: as for load_adapter; or other parameters are trained than those in the folder.
    """
    file, others = Path(folder, OTHERS), _others(model)
    tensors = load_file(file) if file.is_file() else {}
    check_tensors(tensors, others, f" (what is trained beside the adapters, in {OTHERS})")
    load_adapter(model, folder)
    with torch.no_grad():
        for name, parameter in others.items():
            parameter.copy_(tensors[name])
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


def _others(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters that are no adapter's, by name."""
    adapters = {p for layer in adapted_layers(model).values() for p in layer.adapter.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p not in adapters}
