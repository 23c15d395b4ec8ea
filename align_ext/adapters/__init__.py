"""Adapters that stand beside a linear layer, a block or a tensor of experts: one architecture a file."""

from importlib import import_module
from typing import Any

from align_ext.config import AlignLoraConfig


def adapter_class(config: AlignLoraConfig) -> Any:
    """The class of the architecture that the options name (align_ext/architectures.py)."""
    module, _, name = config.row.adapter.partition(":")
    return getattr(import_module(f"align_ext.adapters.{module}"), name)


def make_adapter(config: AlignLoraConfig, in_features: int, out_features: int, *part: int) -> Any:
    """Makes the adapter of a layer of these sizes.

    Args:
        config: the options.
        in_features: n.
        out_features: m.
        part: of a tensor of experts, their number; of a layer in a mixture's block, the width of the block's input and
            whether the layer holds the router; nothing of other layers.
    """
    if config.row.mixture and not part:
        return import_module("align_ext.adapters.mixlora").LoraBesideExperts(config, in_features, out_features)
    if part and not config.row.mixture:
        return import_module("align_ext.adapters.adapted_experts").ExpertsLora(config, in_features, out_features, *part)
    return adapter_class(config)(config, in_features, out_features, *part)
