"""What a Trainer's checkpoint holds of the model: all that is trained and the adapters' state, read strictly.

save_adapter (align_ext/hf/export.py) writes a PEFT folder for others; this is for going on with the same run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from align_ext.state import find_state
from align_ext.config import AlignLoraConfig

WEIGHTS = "align_checkpoint.safetensors"


def save_trained(model: nn.Module, folder: str | Path, gathered: Mapping[str, Tensor] | None = None) -> None:
    """Writes align_checkpoint.safetensors: the trained parameters and the adapters' buffers, and the options.

    Args:
        model: with adapters.
        folder: made if it is not there.
        gathered: the model's state dictionary where its own parameters are shards.
    """
    own = _trained(model)
    tensors = {name: (own if gathered is None else gathered)[name].detach().cpu().contiguous() for name in own}
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(folder, WEIGHTS), metadata={"format": "pt", "options": json.dumps(_options(model))})


def load_trained(model: nn.Module, folder: str | Path) -> None:
    """Reads what save_trained wrote into a model adapted with the same options.

    Raises:
        ValueError: no such file, other options, or other names, shapes or dtypes; the model is unchanged then.
    """
    file, own = Path(folder, WEIGHTS), _trained(model)
    try:
        with safe_open(file, "pt") as content:
            options = json.loads((content.metadata() or {}).get("options", "{}"))
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder} is no checkpoint of AlignTrainer: {WEIGHTS} cannot be read ({error})") from error
    mine = _options(model)
    other = [f"{name}={options.get(name)!r}, now {mine.get(name)!r}" for name in sorted(options.keys() | mine.keys())
             if options.get(name) != mine.get(name)]  # fmt: skip
    if other:
        raise ValueError(f"the checkpoint was trained with other options ({'; '.join(other)}): go on with its own")
    wrong = sorted(name for name in own.keys() | tensors.keys() if _kind(own.get(name)) != _kind(tensors.get(name)))
    if wrong:
        raise ValueError(
            f"the checkpoint does not fit the model in {len(wrong)} tensors, the first is {wrong[0]}: "
            f"{_kind(tensors.get(wrong[0]))} in the file, {_kind(own.get(wrong[0]))} in the model"
        )
    with torch.no_grad():
        for name, tensor in tensors.items():
            own[name].copy_(tensor)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Trained parameters, and whatever belongs to adapters (frozen, or state of a regulariser), by name."""
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    return {name: t for name, t in named if t.requires_grad or name.rpartition(".")[2].startswith("lora_")}


def _options(model: nn.Module) -> dict[str, Any]:
    state = find_state(model)
    config = AlignLoraConfig() if state is None else state.config
    options: dict[str, Any] = json.loads(json.dumps(config.to_dict()))
    return options


def _kind(tensor: Tensor | None) -> str:
    return "nothing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
