"""Finds layers whose weight is read without a call of their forward, so that an adapter would have no effect.

torch's encoder layers do so in evaluation (a fast path), nn.MultiheadAttention and fused kernels of state space models
always. A test run on one machine does not take the code paths of another, so the source code of a layer's ancestors is
read: a method that passes on `self.<path to the layer>.weight`, in a call, an operation, an assignment or a list,
bypasses the layer. Reading its dtype, device or shape does not.
"""

import ast
import functools
import inspect
import operator
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

_METADATA = ("dtype", "device", "shape", "ndim", "requires_grad", "is_meta", "size", "dim", "numel", "is_cuda")
_PREDICATES = ("isinstance", "hasattr", "getattr", "type", "id")
_NOT_RUN = ("init", "reset_parameters", "extra_repr", "tie_weights", "resize")  # prefixes of names
_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip
_WeightRead = tuple[str, tuple[ast.expr, ...]]  # (method, conditions under which it reads the weight)


def bypass_reason(name: str, model: nn.Module) -> str | None:
    """Returns which method bypasses a layer of a model, or None."""
    parts = name.split(".")
    for i in range(len(parts)):
        ancestor: Any = model.get_submodule(".".join(parts[:i]))
        path = tuple("*" if child_node.isdecimal() else child_node for child_node in parts[i:])
        for method, conditions in _weight_reads(type(ancestor)).get(path, ()):  # type: ignore[arg-type]
            if all(_may_hold(condition, ancestor) for condition in conditions):
                return f"{type(ancestor).__name__}.{method} reads its weight past its forward"
    return None


@functools.lru_cache(maxsize=4096)
def _weight_reads(module_class: type) -> dict[tuple[str, ...], list[_WeightRead]]:
    """Returns, by the path from a module of a class to a layer, the methods that read the layer's weight."""
    reads: dict[tuple[str, ...], list[_WeightRead]] = {}
    for base in module_class.__mro__:
        if base in (nn.Module, object) or base.__module__.startswith("transformers.modeling_utils"):
            continue
        for method, function in vars(base).items():
            is_called = inspect.isfunction(function) and getattr(module_class, method, None) is function
            if is_called and not method.lstrip("_").startswith(_NOT_RUN):
                for path, conditions in _weights_in(function):
                    reads.setdefault(path, []).append((method, conditions))
    return reads


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
            if path and _is_passed_on(node, parents):
                yield path, tuple(_conditions(node, parents))


def _conditions(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> Iterator[ast.expr]:
    """Yields the conditions for a statement to run that depend only on constant attributes of self."""
    while (parent := parents.get(node)) is not None:
        if isinstance(parent, ast.If) and node in parent.body:
            names = {child_node.id for child_node in ast.walk(parent.test) if isinstance(child_node, ast.Name)}
            changing = any(isinstance(child_node, ast.Call) for child_node in ast.walk(parent.test)) or "training" in {
                child_node.attr for child_node in ast.walk(parent.test) if isinstance(child_node, ast.Attribute)
            }
            if names == {"self"} and not changing:
                yield parent.test
        node = parent


def _may_hold(condition: ast.expr, module: nn.Module) -> bool:
    """Whether a condition about a module's attributes holds; true if it cannot be evaluated."""
    try:
        return bool(_value(condition, module))
    except (LookupError, TypeError, AttributeError):
        return True


def _value(node: ast.expr, module: nn.Module) -> Any:
    """Evaluates attributes, constants, comparisons and logic; raises LookupError for any other expression."""
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
        return _COMPARISONS[type(node.ops[0])](_value(node.left, module), _value(node.comparators[0], module))
    raise LookupError(type(node).__name__)


def _path(node: ast.AST) -> tuple[str, ...]:
    """Returns the names from self to a module, "*" for an index; empty if it does not start at self."""
    parts: list[str] = []
    while isinstance(node, (ast.Attribute, ast.Subscript)):
        parts.append(node.attr if isinstance(node, ast.Attribute) else "*")
        node = node.value
    return tuple(reversed(parts)) if isinstance(node, ast.Name) and node.id == "self" else ()


def _is_passed_on(node: ast.Attribute, parents: dict[ast.AST, ast.AST]) -> bool:
    if not isinstance(node.ctx, ast.Load):
        return False
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _METADATA
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id not in _PREDICATES
    return not isinstance(parent, (ast.Compare, ast.BoolOp, ast.UnaryOp, ast.If, ast.IfExp, ast.Assert, ast.Expr))
