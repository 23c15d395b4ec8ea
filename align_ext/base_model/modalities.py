"""Refuses alignment of layers that process tokens of images or sound instead of text tokens."""

import inspect
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from align_ext.alignment.sources import encoder_decoder

_CROSS_ATTENTION_INPUTS = {"cross_attention_states", "key_value_states", "encoder_hidden_states"}  # argument names


def refuse_other_modalities(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError if adapted layers of a multimodal model see tokens that the text's mask does not cover."""
    if others := other_modalities(model, names):
        cure = "|".join(sorted({f"{re.escape(path)}\\..*" for path in others.values()}))
        raise ValueError(
            f"{len(others)} layers, the first is {next(iter(others))}, see other tokens than the text's, whose tasks "
            f"and padding nothing tells: leave them out by exclude_modules={cure!r}, or adapt them with align=None"
        )


def other_modalities(model: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Returns which layers of a multimodal model see tokens that the text's mask does not cover, and what holds them.

    The number of tokens does not decide it, since there may be as many patches as words. A layer belongs to the
    modality of the innermost model around it, which its configuration tells.
    """
    outer = next((m for m in model.modules() if hasattr(getattr(m, "config", None), "get_text_config")), None)
    config: Any = None if outer is None else outer.config
    text = None if config is None else config.get_text_config()
    others: dict[str, str] = {}
    if text is None or text is config or encoder_decoder(model) is not None:
        return others
    for name in names:
        path, inner = _innermost_model(model, name)
        parent = name.rpartition(".")[0]
        if type(inner) is not type(text) or _is_cross_attention(model.get_submodule(parent)):
            others[name] = parent if inner is config or type(inner) is type(text) else path
    return others


def _innermost_model(model: nn.Module, name: str) -> tuple[str, Any]:
    """Returns the name and the configuration of the innermost model that holds a layer."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        if hasattr(getattr(module, "config", None), "get_text_config") and hasattr(module, "get_input_embeddings"):
            return path, module.config
    return "", None


def _is_cross_attention(module: nn.Module) -> bool:
    return not _CROSS_ATTENTION_INPUTS.isdisjoint(inspect.signature(type(module).forward).parameters)
