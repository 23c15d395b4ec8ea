"""Groups what is measured of each adapted module by the type of the module, and of each block."""

import re
from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")
_BLOCK = re.compile(r"(?:^|.*?\.)\d+(?:\.[^.\d]+\.\d+)*\.[^.]+")  # the part after a layer's number


def component_of(name: str) -> str:
    """Returns the type of a module: gate_proj of model.layers.0.mlp.gate_proj."""
    return name.rpartition(".")[2]


def block_of(name: str) -> str:
    """Returns the name of the block that a module is in, or is: model.layers.0.mlp of model.layers.0.mlp.gate_proj."""
    found = _BLOCK.match(name)
    return found.group() if found else name


def block_type_of(name: str) -> str:
    """Returns the type of the block that a module is in: "attention", or the block's own name (mlp)."""
    block = component_of(block_of(name))
    return "attention" if "att" in block.lower() else block


def by_component(layers: Mapping[str, T]) -> dict[str, list[T]]:
    """Returns the values of each type of module, in the order of the layers."""
    found: dict[str, list[T]] = {}
    for name, value in layers.items():
        found.setdefault(component_of(name), []).append(value)
    return found


def by_block(layers: Mapping[str, T]) -> dict[str, list[T]]:
    """Returns the values of each type of block, in the order of the layers."""
    found: dict[str, list[T]] = {}
    for name, value in layers.items():
        found.setdefault(block_type_of(name), []).append(value)
    return found
