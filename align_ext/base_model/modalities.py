"""Refuses alignment of layers that see other tokens than the text's: images, sound, what a projector makes of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from align_ext.alignment.sources import encoder_decoder

_OTHERS_TOKENS = {"cross_attention_states", "key_value_states", "encoder_hidden_states"}  # arguments of cross-attention


def refuse_other_modalities(model: nn.Module, names: Iterable[str]) -> None:
    """Raises ValueError if adapted layers of a model of several modalities see tokens that its text mask is not about.

    How many tokens a layer sees says nothing: there may be as many patches as words. A layer belongs to the modality of
    the innermost model around it, which its configuration tells.
    """
    from transformers import PreTrainedConfig  # here, so that `align-lora --help` does not wait for it

    whole = next((m for m in model.modules() if isinstance(getattr(m, "config", None), PreTrainedConfig)), None)
    config: Any = None if whole is None else whole.config
    text = None if config is None else config.get_text_config()
    if text is None or text is config or encoder_decoder(model) is not None:
        return
    others: dict[str, str] = {}
    for name in names:
        place, inner = _innermost(model, name)
        parent = name.rpartition(".")[0]
        if type(inner) is not type(text) or _is_cross_attention(model.get_submodule(parent)):
            others[name] = parent if inner is config or type(inner) is type(text) else place
    if others:
        cure = "|".join(sorted({f"{re.escape(place)}\\..*" for place in others.values()}))
        raise ValueError(
            f"{len(others)} layers, the first is {next(iter(others))}, see other tokens than the text's, whose tasks "
            f"and padding nothing tells: leave them out by exclude_modules={cure!r}, or adapt them with align=None"
        )


def _innermost(model: nn.Module, name: str) -> tuple[str, Any]:
    """Name and configuration of the innermost model that holds a layer."""
    from transformers import PreTrainedConfig

    place = name
    while place:
        place = place.rpartition(".")[0]
        config = getattr(model.get_submodule(place), "config", None)
        if isinstance(config, PreTrainedConfig) and hasattr(model.get_submodule(place), "get_input_embeddings"):
            return place, config
    return "", None


def _is_cross_attention(module: nn.Module) -> bool:
    return not _OTHERS_TOKENS.isdisjoint(inspect.signature(type(module).forward).parameters)
