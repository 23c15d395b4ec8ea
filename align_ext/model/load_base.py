"""Loads the base model of an adapter's folder."""

import logging
from typing import Any

import torch

from align_ext.base_model.load import load_model
from align_ext.io.adapter_folder import AdapterFolder
from align_ext.system.messages import shown
from align_ext.system.terminal import PrintLine

_LOG = logging.getLogger(__name__)


def load_base(
    name: str | None, stored: AdapterFolder, dtype: str | torch.dtype, print_line: PrintLine = _LOG.info
) -> tuple[Any, Any]:
    """Loads the base model of an adapter: the given one, or else the one that the adapter records.

    Raises:
        ValueError: no model is given or recorded, it cannot be loaded, or it is no causal language model.
    """
    recorded, kind = stored.base_name, stored.peft.get("task_type")
    if kind not in (None, "CAUSAL_LM"):
        raise ValueError(
            f"the adapter is for a model of another kind (task_type={shown(kind)}), and commands load causal language "
            "models: in Python load_adapter(model, folder) takes any model, as merge_and_unload and export_peft do"
        )
    if name is None and recorded is None:
        raise ValueError("the adapter does not say which base model it belongs to: name it with --model")
    try:
        return load_model(name or recorded, dtype, print_line)
    except ValueError as error:
        hint = "" if name is not None else "; the adapter says that it is its base: --model names another place"
        raise ValueError(f"{error}{hint}") from error
