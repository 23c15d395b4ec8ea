"""Adapters that stand beside a linear layer or a block: one architecture a file."""

from importlib import import_module
from typing import Any

from align_ext.config import AlignLoraConfig


def adapter_class(config: AlignLoraConfig) -> Any:
    """The class of the architecture that the options name (align_ext/architectures.py)."""
    module, _, name = config.row.adapter.partition(":")
    return getattr(import_module(f"align_ext.adapters.{module}"), name)
