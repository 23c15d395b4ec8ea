"""Options as dataclass fields with a help text and a rule that checks the value: integers, numbers, known names."""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from align_ext.system.messages import shown

MAX_SIZE = 65_536  # the largest integer that an option may give as a size
# What users call an option, and its name here.
_SYNONYMS = {
    "rank": "r", "lora_r": "r", "alpha": "lora_alpha", "dropout": "lora_dropout", "learning_rate": "lr",
    "heads": "num_heads", "weight": "align_weight",
}  # fmt: skip
_LARGEST = 1e30  # the largest number of an option: float32 can hold it and its product with a weight

_Options = TypeVar("_Options")
Rule = Callable[[Any], str | None]  # a value -> None if it is valid, else a text that says what it must be


def unknown_name(kind: str, name: Any, allowed: Iterable[str | None]) -> str:
    """Returns the message for a name that is not allowed; it suggests what is meant or most similar."""
    allowed = list(allowed)
    folded = {str(word).casefold(): word for word in reversed(allowed)}
    word = shown(name).strip("'").casefold()
    meant = _SYNONYMS.get(word.replace("-", "_"))
    nearest = [meant] if meant in folded else difflib.get_close_matches(word, folded, n=1)
    hint = f"; did you mean {folded[nearest[0]]!r}?" if nearest else ""
    known = ", ".join(map(str, allowed))
    known = known if len(known) < 300 else f"{known[:300].rpartition(',')[0]}, ..."
    return f"unknown {kind} {shown(name)}{hint} (known: {known})"


def is_whole(value: Any, minimum: int = 1, maximum: int = MAX_SIZE) -> bool:
    """Whether a value is an integer within the bounds."""
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum


def is_number(value: Any) -> bool:
    """Whether a value is a number that float32 can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


def is_positive(value: Any) -> bool:
    """Whether a value is a number that stays above zero in float32."""
    return is_number(value) and value >= 1 / _LARGEST


def integer_text(value: Any, maximum: int = MAX_SIZE) -> str:
    """Returns the text that says what a positive integer must be."""
    large = isinstance(value, int) and value > maximum
    return f"a positive integer, at most {maximum}" if large else "a positive integer"


def integer_rule(minimum: int = 1, maximum: int = MAX_SIZE, allowed: str | None = None, *, none: bool = False) -> Rule:
    """Returns the rule of an integer within the bounds; allowed: the text for it; none: the text also allows None."""

    def rule(value: Any) -> str | None:
        if is_whole(value, minimum, maximum):
            return None
        return allowed or f"{'0 or ' * (minimum == 0)}{integer_text(value, maximum)}{', or None' * none}"

    return rule


def positive(value: Any) -> str | None:
    """Checks for a number above zero."""
    return None if is_positive(value) else "a positive number"


def not_negative(value: Any) -> str | None:
    """Checks for a number of at least zero."""
    return None if is_number(value) and value >= 0 else "a number >= 0"


def true_or_false(value: Any) -> str | None:
    """Checks for a bool."""
    return None if isinstance(value, bool) else "true or false"


def by_name(rule: Rule) -> Rule:
    """Returns the rule of an option that gives values, each by this rule, to names of layers."""

    def wanted(value: Any) -> str | None:
        valid = isinstance(value, Mapping) and all(isinstance(name, str) for name in value)
        wrong = None if not valid else next((what for x in value.values() if (what := rule(x))), None)
        return wrong and f"{wrong} for each name" if valid else "values by the names of layers"

    return wanted


def option(default: Any, text: str, rule: Rule | None = None, argument: str | None = None) -> Any:
    """Returns a dataclass field for an option.

    Args:
        default: the default value.
        text: the help text.
        rule: the rule; without one, a Literal or bool is checked by its type.
        argument: the field of transformers' TrainingArguments that gets the value.
    """
    metadata = {"help": text, "rule": rule, "argument": argument}
    given: Any = {"default_factory": dict} if default == {} else {"default": default}
    return field(**given, metadata=metadata)


def default_of(entry: Field[Any]) -> Any:
    """Returns the default of a field of options."""
    return entry.default if entry.default_factory is MISSING else entry.default_factory()


def documented(kind: type[_Options]) -> type[_Options]:
    """Adds the help text of each option to the docstring of a class of options."""
    entries = (f"    {entry.name}: {entry.metadata['help']}" for entry in fields(kind) if "help" in entry.metadata)  # type: ignore[arg-type]
    kind.__doc__ = "\n".join([inspect.getdoc(kind) or "", "", "Attributes:", *entries])
    return kind


def check_options(options: Any, *, quoted: bool = True, paths: Mapping[str, str] | None = None) -> None:
    """Raises ValueError for the first field that breaks its rule; None is valid where the type allows it.

    Args:
        options: a dataclass of options.
        quoted: whether the message quotes words as in Python, or names them as on a command line.
        paths: what messages call a field, where it is not its name.
    """
    for name, (rule, optional) in _rules(type(options), quoted).items():  # type: ignore[arg-type]
        value = getattr(options, name)
        if not (optional and value is None) and (allowed := rule(value)):
            raise ValueError(f"{(paths or {}).get(name, name)} must be {allowed}, got {shown(value)}")


@functools.cache
def _rules(kind: Any, quoted: bool) -> Mapping[str, tuple[Rule, bool]]:
    """Returns the rule of each field, and whether the field may be None."""
    rules, hints = {}, get_type_hints(kind)
    for entry in fields(kind):
        field_type = hints[entry.name]
        optional = type(None) in get_args(field_type)
        rule = entry.metadata.get("rule") or (true_or_false if field_type is bool else _literal(field_type, quoted))
        if rule is not None:
            rules[entry.name] = (rule, optional)
    return rules


def _literal(kind: Any, quoted: bool) -> Rule | None:
    """Returns the rule of a Literal, alone or in a union, or None for another type."""
    kinds = (kind, *get_args(kind))
    choices = [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    allowed = " or ".join(f'"{choice}"' for choice in choices) if quoted else f"one of {', '.join(choices)}"
    return (lambda value: None if value in choices else allowed) if choices else None
