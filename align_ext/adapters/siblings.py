"""Layers that one module calls with the same tensor, q, k and v or gate and up: in training one operator for all.

Which layers these are is read from the source of the module's forward, so that a forward and its recomputation by
activation checkpointing decide alike. The first one that is called computes all; the others return what is theirs if
they get that very tensor, and compute by themselves if not.
"""

import ast
import inspect
import textwrap
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.adapters.linear_layer import has_hooks
from align_ext.ops import sibling_lora
from align_ext.ops.sibling_lora import MAX_SIBLINGS

_CONDITIONAL = (ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def join_siblings(model: nn.Module) -> None:
    """Has adapted layers that a module of the model calls with the same tensor computed together."""
    for parent in model.modules():
        for called in called_together(type(parent).forward):
            ours = [child for child in called if _joins(parent._modules.get(child))]
            for begin in range(0, len(ours), MAX_SIBLINGS):
                group = ours[begin : begin + MAX_SIBLINGS]
                siblings = Siblings(parent, group) if len(group) > 1 else None
                for child in group:
                    layer: Any = parent._modules[child]
                    layer.siblings = siblings


class Siblings:
    """Adapted layers of one module that its forward calls with the same tensor.

    Args:
        parent: the module.
        names: the layers' names in it, in the order in which it calls them.
    """

    def __init__(self, parent: nn.Module, names: list[str]) -> None:
        self.parent, self.names = parent, names
        self._x: Callable[[], Tensor | None] = _nothing  # what the kept outputs are of
        self._version = 0
        self._together = False  # whether they were computed together, or each layer is on its own
        self._kept: dict[str, tuple[Tensor, Tensor]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_x": _nothing, "_kept": {}}

    def outputs(self, layer: AdaptedLinear, x: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns y and z of a layer for x, computed together with those of its siblings; None: it is on its own."""
        name = next((name for name in self.names if self.parent._modules.get(name) is layer), None)
        if name is None or x.is_inference() or torch._C._are_functorch_transforms_active():
            return None
        same = self._x() is x and self._version == x._version
        if not same or (self._together and name not in self._kept):
            self._kept = self._compute(x)
            self._x, self._version, self._together = weakref.ref(x), x._version, bool(self._kept)
        return self._kept.pop(name, None)

    def _compute(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Returns y and z of all layers that can be computed together, by name; nothing where that is one or none."""
        layers: dict[str, Any] = {}
        for name in self.names:
            layer: Any = self.parent._modules.get(name)
            if _joins(layer) and _is_plain(layer):
                A, B, scaling = layer.adapter.sibling_arguments()
                whole = all(type(p) is nn.Parameter and p.numel() > 0 and p.device == x.device for p in (A, B))
                base = layer.weight_arguments(x) if whole else None  # not of a shard
                if base is not None and isinstance(base[0], Tensor):  # quantised weights are made one at a time
                    layers[name] = (layer.adapter, A, B, scaling, *base)
        if len(layers) < 2:
            return {}
        adapters, A, B, scaling, weight, bias = zip(*layers.values(), strict=True)
        dropout_p, rng = adapters[0].dropout(x, adapters[0].step())
        y, z = sibling_lora(x, A, B, scaling, dropout_p=dropout_p, rng=rng, weight=weight, bias=bias)
        return dict(zip(layers, zip(y, z, strict=True), strict=True))


def _nothing() -> None:
    """In place of a reference: to no tensor."""


def _joins(layer: nn.Module | None) -> bool:
    """Whether a module is a layer that sibling_lora computes."""
    return isinstance(layer, AdaptedLinear) and layer.adapter.sibling_arguments() is not None


def _is_plain(layer: AdaptedLinear) -> bool:
    """Whether calling the layer in training does nothing beside its forward."""
    alone = layer.merged or layer.disabled or has_hooks(layer) or has_hooks(layer.adapter)
    return layer.training and not alone and "forward" not in layer.__dict__


@cache
def called_together(forward: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    """Returns the names of children, two or more each, that a module's forward always calls with the same variable.

    These are calls self.child(variable) in one block of statements, without an assignment to the variable between them.
    """
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):  # there is no source
        return ()
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return ()
    found: list[list[str]] = []
    _collect(function.body, function.args.args[0].arg, found)
    return tuple(tuple(group) for group in found if len(group) == len(set(group)) > 1)


def _collect(block: list[ast.stmt], self_name: str, found: list[list[str]]) -> None:
    """Adds the groups of a block of statements, and of the blocks in it."""
    groups: dict[str, list[str]] = {}  # by variable
    for statement in block:
        inner = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
        inner += [handler.body for handler in getattr(statement, "handlers", [])]
        if not any(inner):
            for child, variable in _calls(statement, self_name):
                groups.setdefault(variable, []).append(child)
        for statements in inner:
            _collect(statements, self_name, found)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and node.id in groups:
                found.append(groups.pop(node.id))
    found.extend(groups.values())


def _calls(node: ast.AST, self_name: str) -> Iterator[tuple[str, str]]:
    """The children that a statement calls with one variable whatever happens, and the variable."""
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, _CONDITIONAL):
            yield from _calls(inner, self_name)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and not node.keywords:
        of_self = isinstance(node.func.value, ast.Name) and node.func.value.id == self_name
        if of_self and len(node.args) == 1 and isinstance(node.args[0], ast.Name):
            yield node.func.attr, node.args[0].id
