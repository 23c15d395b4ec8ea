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
from align_ext.adapters.base import Adapter, SiblingArguments
from align_ext.adapters.linear_layer import has_hooks
from align_ext.ops import sibling_lora
from align_ext.ops.sibling_lora import MAX_SIBLINGS

Outputs = tuple[Tensor, Tensor, Tensor | None]  # y, z, w
_VERSIONED = {"A", "B", "R", "A0", "B0"}
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

    It holds no module: a layer that is copied takes no other one with it, and a model that nobody holds is freed at
    once.

    Args:
        parent: the module.
        names: the layers' names in it, in the order in which it calls them.
    """

    def __init__(self, parent: nn.Module | None, names: list[str]) -> None:
        self.names = names
        self._parent: Callable[[], nn.Module | None] = _nothing if parent is None else weakref.ref(parent)
        self._x: Callable[[], Tensor | None] = _nothing  # what the kept outputs are of
        self._versions: tuple[Any, ...] = ()
        self._parameters: tuple[Tensor, ...] = ()
        self._together = False  # whether they were computed together, or each layer is on its own
        self._kept: dict[nn.Module, Outputs] = {}

    @property
    def parent(self) -> nn.Module | None:
        """The module, or None of the copy of a layer alone."""
        return self._parent()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Siblings":
        return Siblings(memo.get(id(self.parent)), self.names)

    def __reduce__(self) -> tuple[Any, ...]:
        return Siblings, (None, self.names), {"parent": self.parent}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["parent"], self.names)  # type: ignore[misc]

    def layers(self) -> list[Any]:
        """What stands in the layers' places, in order."""
        parent = self.parent
        return [] if parent is None else [parent._modules.get(name) for name in self.names]

    def outputs(self, layer: AdaptedLinear, x: Tensor) -> Outputs | None:
        """Returns y, z and w of a layer for x, computed together with those of its siblings; None: it is on its own."""
        if x.is_inference() or torch._C._are_functorch_transforms_active():
            return None
        same = self._x() is x and self._versions == self._versions_of(x)
        if not same or (self._together and not self._is_kept(layer)):
            if layer not in self.layers():
                return None
            self._kept = self._compute(x)
            self._x, self._versions, self._together = weakref.ref(x), self._versions_of(x), bool(self._kept)
        return self._kept.pop(layer, None)

    def _versions_of(self, x: Tensor) -> tuple[Any, ...]:
        """What changes when the outputs would be others."""
        return torch.is_grad_enabled(), x._version, *(parameter._version for parameter in self._parameters)

    def _is_kept(self, layer: AdaptedLinear) -> bool:
        """Whether there is an output of the layer that backward has not gone through yet, and freed what it needs."""
        return layer in self._kept and not getattr(self._kept[layer][0].grad_fn, "went_back", False)

    def _compute(self, x: Tensor) -> dict[nn.Module, Outputs]:
        """Returns y, z and w of all layers that can be computed together; nothing where that is one or none."""
        own: dict[nn.Module, dict[str, Any]] = {}
        common: Any = None  # what is that of the first one in all
        for layer in self.layers():
            if not isinstance(layer, AdaptedLinear) or not _is_plain(layer):
                continue
            given = _arguments(layer.adapter)
            if given is None or common not in (None, (given.common, layer.adapter.dropout_p)):
                continue
            whole = all(_is_whole(tensor, x) for tensor in given.own.values() if isinstance(tensor, Tensor))
            base = layer.weight_arguments(x) if whole else None
            if base is not None and isinstance(base[0], Tensor):  # quantised weights are made one at a time
                own[layer] = given.own | {"weight": base[0], "bias": base[1]}
                common = given.common, layer.adapter.dropout_p
        self._parameters = ()
        if len(own) < 2:
            return {}
        of_layers: dict[str, Any] = {name: [given[name] for given in own.values()] for name in next(iter(own.values()))}
        self._parameters = tuple(t for name in _VERSIONED & of_layers.keys() for t in of_layers[name])
        first: Any = next(iter(own)).adapter
        dropout_p, rng = first.dropout(x, first.step())
        y, z, w = sibling_lora(x, **of_layers, **common[0], dropout_p=dropout_p, rng=rng)
        return dict(zip(own, zip(y, z, w or [None] * len(own), strict=True), strict=True))


def _nothing() -> None:
    """In place of a reference: to no tensor."""


def _joins(layer: nn.Module | None) -> bool:
    """Whether a module is a layer that sibling_lora computes."""
    return isinstance(layer, AdaptedLinear) and _arguments(layer.adapter) is not None


def _arguments(adapter: Adapter) -> SiblingArguments | None:
    """What sibling_lora takes of a layer; None of a subclass that computes something else than what its base says."""
    for kind in type(adapter).__mro__:
        if "low_rank_forward" in vars(kind) or "sibling_arguments" in vars(kind):
            return adapter.sibling_arguments() if "sibling_arguments" in vars(kind) else None
    return None


def _is_plain(layer: AdaptedLinear) -> bool:
    """Whether calling the layer and its adapter in training does nothing beside their forwards."""
    changed = layer.merged or layer.disabled or nn.modules.module._has_any_global_hook()
    return not changed and _is_only_forward(layer) and _is_only_forward(layer.adapter)


def _is_whole(tensor: Tensor, x: Tensor) -> bool:
    """Whether a parameter or buffer is one, where x is, and not a shard."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.device == x.device and tensor.numel() > 0


def _is_only_forward(module: nn.Module) -> bool:
    """Whether calling a module in training is its class's forward and nothing more."""
    replaced = "forward" in module.__dict__ or module._compiled_call_impl is not None
    return module.training and not replaced and not has_hooks(module)


@cache
def called_together(forward: Callable[..., Any]) -> tuple[tuple[str, ...], ...]:
    """Returns the names of children, two or more each, that a module's forward always calls with the same variable.

    These are calls self.child(variable) in one block of statements, with neither an assignment to the variable nor a
    way out of the block between them. A child that is called with others elsewhere is in no group.
    """
    try:
        function = ast.parse(textwrap.dedent(inspect.getsource(forward))).body[0]
    except (OSError, TypeError, SyntaxError):  # there is no source
        return ()
    if not isinstance(function, ast.FunctionDef) or not function.args.args:
        return ()
    found: list[list[str]] = []
    _collect(function.body, function.args.args[0].arg, found)
    sets = [set(group) for group in found]
    alike = [all(one == other or not one & other for other in sets) for one in sets]
    groups = {frozenset(group): tuple(group) for group, same in zip(found, alike, strict=True) if same}
    return tuple(group for names, group in groups.items() if len(group) == len(names) > 1)


def _collect(block: list[ast.stmt], self_name: str, found: list[list[str]]) -> None:
    """Adds the groups of a block of statements, and of the blocks in it."""
    groups: dict[str, list[str]] = {}  # by variable
    for statement in block:
        inner = [getattr(statement, field, []) for field in ("body", "orelse", "finalbody")]
        inner += [part.body for field in ("handlers", "cases") for part in getattr(statement, field, [])]
        if not any(inner):
            for child, variable in _calls(statement, self_name):
                groups.setdefault(variable, []).append(child)
        for statements in inner:
            _collect(statements, self_name, found)
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load) and node.id in groups:
                found.append(groups.pop(node.id))
            elif isinstance(node, (ast.Return, ast.Break, ast.Continue)):
                found.extend(groups.values())
                groups.clear()
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
