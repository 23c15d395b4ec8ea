"""Converts the values of options, as YAML or a command line give them, to the options' types."""

import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from align_ext.config import AUTO
from align_ext.data.named_source import pairs_of
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the members of a union, or a tuple of the type."""
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def is_repeated(kind: Any) -> bool:
    """Whether an option of this type may be given several times, once for each of its values."""
    return any(get_origin(member) is list for member in alternatives(kind))


def convert_option(name: str, value: Any, kind: Any, default: Any) -> Any:
    """Converts a value from YAML or a command line to its option's type.

    Args:
        name: the option's name.
        value: the value as it is given.
        kind: the option's type.
        default: its default value.

    Raises:
        ValueError: the value is of another type.
    """
    kinds = alternatives(kind)
    if is_repeated(kind):
        value = list(value) if isinstance(value, (list, tuple)) else [value]
        value = value[0] if len(value) == 1 and isinstance(value[0], (str, type(None))) else value or None
        if isinstance(value, list):
            return value
    if isinstance(value, Mapping) and tuple[str, ...] in kinds:
        value = [f"{key}={part}" for key, part in pairs_of(value, name, "name=value").items()]
    if default == AUTO and isinstance(value, str) and value == AUTO:
        return AUTO
    named = isinstance(value, Mapping) or (isinstance(value, str) and "=" in value)
    if get_origin(kind) is Mapping or (named and any(get_origin(member) is Mapping for member in kinds)):
        return _convert_mapping(name, value)
    if value is None or (isinstance(value, str) and value == "none"):
        if type(None) in kinds:
            return None
        value = () if any(get_origin(kind) is tuple for kind in kinds) else value
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    if choices and type(None) in kinds and isinstance(value, str) and value not in choices:
        raise ValueError(unknown_name(name, value, [*choices, "none"]))  # AlignLoraConfig would say None
    if str in kinds and isinstance(value, str) and not re.fullmatch(r"[\w.,\s-]+", value):
        return value  # a path, or a regular expression
    for kind in kinds:
        try:
            return _convert(value, kind)
        except (ValueError, OverflowError):  # float raises OverflowError for a huge integer
            continue
    wanted = " or ".join("none" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise ValueError(f"{name} must be of type {wanted}, got {shown(value)}")


def _convert_mapping(name: str, value: Any) -> dict[str, Any]:
    """Converts name=value pairs, separated by commas outside of brackets and quotes, whose values are YAML's."""
    if value in (None, "", "none"):
        return {}
    if isinstance(value, str):
        pairs = [pair.partition("=") for pair in _split(value)]
        if not all(key.strip() and equals for key, equals, _ in pairs):
            raise ValueError(f"{name} must be name=value, separated by commas, got {shown(value)}")
        try:
            value = {key.strip(): yaml.safe_load(text) for key, _, text in pairs}
        except yaml.YAMLError as error:
            raise ValueError(f"{name} holds {shown(value)}, of which a value is no YAML") from error
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError(f"{name} must hold values by name, got {shown(value)}")
    return {key: _with_numbers(part) for key, part in value.items()}


def _split(text: str) -> list[str]:
    """Returns the parts of a text between commas that stand in no brackets and no quotes."""
    parts: list[str] = []
    for piece in text.split(","):
        last = parts[-1] if parts else ""
        if len(re.findall(r"[\[{]", last)) > len(re.findall(r"[\]}]", last)) or last.count('"') % 2:
            parts[-1] += f",{piece}"
        else:
            parts.append(piece)
    return parts


def _with_numbers(value: Any) -> Any:
    """Returns a value of YAML with numbers for texts such as 1e-5, which YAML 1.1 reads as a number with a dot only."""
    if isinstance(value, Mapping):
        return {key: _with_numbers(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_with_numbers(part) for part in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+e[-+]?\d+", value, re.I) else value


def _convert(value: Any, kind: Any) -> Any:
    """Converts a value to one type, or raises ValueError."""
    if get_origin(kind) is Literal:
        return value  # AlignLoraConfig checks it
    if get_origin(kind) is tuple:
        parts = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
        if isinstance(parts, (list, tuple)):
            return tuple(_convert(part, get_args(kind)[0]) for part in parts)
    if type(value) is kind:
        return value
    if kind is float and type(value) in (int, str):
        return float(value)  # YAML 1.1 reads 2e-4, without a dot, as a string
    if kind is int and isinstance(value, str):
        return int(value)
    raise ValueError(f"{shown(value)} is no {kind}")
