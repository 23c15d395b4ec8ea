"""Adapters that stand beside a linear layer, a block or a tensor of experts: one architecture a file."""

from importlib import import_module
from typing import Any

from align_ext.config import AlignLoraConfig


def adapter_class(config: AlignLoraConfig) -> Any:
    """The class of the architecture that the options name (align_ext/architectures.py)."""
    module, _, name = config.row.adapter.partition(":")
    return getattr(import_module(f"align_ext.adapters.{module}"), name)


def make_adapter(config: AlignLoraConfig, in_features: int, out_features: int, experts: int | None = None) -> Any:
    """Makes the adapter of a layer of these sizes; experts: their number, beside a tensor of experts."""
    if experts is None:
        return adapter_class(config)(config, in_features, out_features)
    return import_module("align_ext.adapters.adapted_experts").ExpertsLora(config, in_features, out_features, experts)
