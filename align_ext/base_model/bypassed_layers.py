"""Layers whose weight is read past their forward, so that an adapter beside them would do nothing, or only at times.

torch's encoder layers read theirs in evaluation (a fast path), nn.MultiheadAttention and fused kernels of state space
models always. No probe on one machine sees the paths of another, so the sources of a layer's ancestors are read: a
method that hands `self.<path to the layer>.weight` on, in a call, an operation, an assignment or a list, bypasses it.
Looking at its dtype, device or shape does not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_LOOKED_AT = ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "size", "dim", "numel", "is_cuda")
_PREDICATES = ("isinstance", "hasattr", "getattr", "type", "id")
_NOT_RUN = ("init", "reset_parameters", "extra_repr", "tie_weights", "resize")  # beginnings of names
_COMPARED: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
_Reading = tuple[str, tuple[ast.expr, ...]]  # a method, conditions


def bypassed(name: str, model: nn.Module) -> str | None:
    """Where the weight of a model's layer is read past its forward, or None."""
    parts = name.split(".")
    for i in range(len(parts)):
        ancestor: Any = model.get_submodule(".".join(parts[:i]))
        path = tuple("*" if part.isdecimal() else part for part in parts[i:])
        for method, conditions in _reads(type(ancestor)).get(path, ()):  # type: ignore[arg-type]
            if all(_may_hold(condition, ancestor) for condition in conditions):
                return f"{type(ancestor).__name__}.{method} reads its weight past its forward"
    return None


@functools.lru_cache(maxsize=4096)
def _reads(kind: type) -> dict[tuple[str, ...], list[_Reading]]:
    """Paths from a class's modules to layers whose weights its methods read: where, and under which conditions."""
    found: dict[tuple[str, ...], list[_Reading]] = {}
    for base in kind.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("transformers.modeling_utils"):
            continue
        for method, function in vars(base).items():
            runs = inspect.isfunction(function) and getattr(kind, method, None) is function
            if runs and not method.lstrip("_").startswith(_NOT_RUN):
                for path, conditions in _weights_in(function):
                    found.setdefault(path, []).append((method, conditions))
    return found


def _weights_in(function: object) -> Iterator[tuple[tuple[str, ...], tuple[ast.expr, ...]]]:
    try:
        source = inspect.getsource(function)  # type: ignore[arg-type]
        tree = ast.parse(textwrap.dedent(source)) if "weight" in source else ast.Module([], [])
    except (OSError, TypeError, SyntaxError):
        return
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "weight":
            path = _path(node.value)
            if path and _is_handed_on(node, parents):
                yield path, tuple(_conditions(node, parents))


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.expr]:
    """What has to hold for a statement to run, as far as it is about attributes of self that stay as they are."""
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If) and node in parent.body:
            names = {part.id for part in ast.walk(parent.test) if isinstance(part, ast.Name)}
            changing = any(isinstance(part, ast.Call) for part in ast.walk(parent.test)) or "training" in {
                part.attr for part in ast.walk(parent.test) if isinstance(part, ast.Attribute)
            }
            if names == {"self"} and not changing:
                yield parent.test
        node = parent


def _may_hold(condition: ast.expr, module: nn.Module) -> bool:
    """Whether a condition about a module's attributes holds; true where that cannot be told."""
    try:
        return bool(_value(condition, module))
    except (LookupError, TypeError, AttributeError):
        return True


def _value(node: ast.expr, module: nn.Module) -> Any:
    """The value of an expression of attributes, constants, comparisons and logic; LookupError for any other."""
    if isinstance(node, ast.Name) and node.id == "self":
        return module
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, module), node.attr)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, module)
    if isinstance(node, ast.BoolOp):
        values = [bool(_value(value, module)) for value in node.values]
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return _COMPARED[type(node.ops[0])](_value(node.left, module), _value(node.comparators[0], module))
    raise LookupError(type(node).__name__)


def _path(node: ast.AST) -> tuple[str, ...]:
    """The names from self to a module, "*" for an index; empty if it does not start at self."""
    parts: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        parts.append(node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    return tuple(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ()


def _is_handed_on(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    if not isinstance(node.ctx, ast.Load):
        return False
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _LOOKED_AT
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id not in _PREDICATES
    return not isinstance(parent, (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.If, ast.IfExp, ast.Assert, ast.Expr))
