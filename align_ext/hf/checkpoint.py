"""What a Trainer's checkpoint holds of the model: the adapters' folder, and what else is trained; read strictly."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from align_ext.hf.export import load_adapter, save_adapter
from align_ext.hf.folder import check_tensors, write_tensors
from align_ext.hf.replace import adapted_layers

OTHERS = "align_trained.safetensors"


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


def _others(model: nn.Module) -> dict[str, Tensor]:
    """The trained parameters that are no adapter's, by name."""
    adapters = {p for layer in adapted_layers(model).values() for p in layer.adapter.parameters()}
    return {name: p for name, p in model.named_parameters() if p.requires_grad and p not in adapters}
