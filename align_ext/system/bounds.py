"""Options as fields of a dataclass with a help text and a rule: sizes that memory holds, numbers, known names."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from align_ext.system.reading import shown

MOST = 65_536  # of an integer that is the size of something
_LARGEST = 1e30  # of a number: float32 holds it, and its product with a weight

_Options = TypeVar("_Options")
Rule = Callable[[Any], str | None]  # a value -> what it must be, or None if it is


def unknown_name(kind: str, name: Any, allowed: Iterable[str | None]) -> str:
    """A message for a name that is not one of the allowed ones, with the nearest of them."""
    allowed = list(allowed)
    folded = {str(word).casefold(): word for word in reversed(allowed)}
    nearest = difflib.get_close_matches(shown(name).strip("'").casefold(), folded, n=1)
    hint = f"; did you mean {folded[nearest[0]]!r}?" if nearest else ""
    known = ", ".join(map(str, allowed))
    known = known if len(known) < 300 else f"{known[:300].rpartition(',')[0]}, ..."
    return f"unknown {kind} {shown(name)}{hint} (known: {known})"


def is_whole(value: Any, least: int = 1, most: int = MOST) -> bool:
    """Whether a value is an integer within the bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_positive(value: Any) -> bool:
    """Whether a value is a number that is not zero in float32 either."""
    return is_number(value) and value >= 1 / _LARGEST


def whole(value: Any, most: int = MOST) -> str:
    """What an option that is to be a positive integer should be."""
    large = isinstance(value, int) and value > most
    return f"a positive integer, at most {most}" if large else "a positive integer"


def whole_number(least: int = 1, most: int = MOST, allowed: str | None = None, *, none: bool = False) -> Rule:
    """The rule of an integer within the bounds; allowed: how to say so; none: whether to say that None will do too."""

    def rule(value: Any) -> str | None:
        if is_whole(value, least, most):
            return None
        return allowed or f"{'0 or ' * (least == 0)}{whole(value, most)}{', or None' * none}"

    return rule


def positive(value: Any) -> str | None:
    """The rule of a number above zero."""
    return None if is_positive(value) else "a positive number"


def not_negative(value: Any) -> str | None:
    """The rule of a number of at least zero."""
    return None if is_number(value) and value >= 0 else "a number >= 0"


def true_or_false(value: Any) -> str | None:
    """The rule of a switch."""
    return None if isinstance(value, bool) else "true or false"


def option(default: Any, text: str, rule: Rule | None = None) -> Any:
    """A field of a dataclass of options; without a rule, its type says what a literal or a bool may be."""
    return field(default=default, metadata={"help": text, "rule": rule})


def documented(kind: type[_Options]) -> type[_Options]:
    """A class of options whose docstring names each option, from its help text."""
    entries = (f"    {entry.name}: {entry.metadata['help']}" for entry in fields(kind) if "help" in entry.metadata)  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([inspect.getdoc(kind) or "", "", "Attributes:", *entries])
    return kind


def check_options(options: Any, *, quoted: bool = True) -> None:
    """Raises ValueError for the first field that breaks its rule; None passes where the type has it.

    Args:
        options: a dataclass of options.
        quoted: whether words are named as Python writes them, or as a command line does.
    """
    for name, (rule, optional) in _rules(type(options), quoted).items():  # type: ignore[arg-type]
        value = getattr(options, name)
        if not (optional and value is None) and (allowed := rule(value)):
            raise ValueError(f"{name} must be {allowed}, got {shown(value)}")


@functools.cache
def _rules(kind: Any, quoted: bool) -> Mapping[str, tuple[Rule, bool]]:
    """Each field's rule, and whether it may be None."""
    rules, hints = {}, get_type_hints(kind)
    for entry in fields(kind):
        of_field = hints[entry.name]
        optional = type(None) in get_args(of_field)
        rule = entry.metadata.get("rule") or (true_or_false if of_field is bool else _literal(of_field, quoted))
        if rule is not None:
            rules[entry.name] = (rule, optional)
    return rules


def _literal(kind: Any, quoted: bool) -> Rule | None:
    """The rule of a Literal, alone or in a union."""
    kinds = (kind, *get_args(kind))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    words = " or ".join(f'"{choice}"' for choice in choices) if quoted else f"one of {', '.join(choices)}"
    return (lambda value: None if value in choices else words) if choices else None
