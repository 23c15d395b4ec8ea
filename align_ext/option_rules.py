"""The rules of AlignLoraConfig's options: each returns what a value must be, or None if it is valid."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from align_ext.system.bounds import MAX_SIZE, integer_rule, is_number, is_positive, is_whole, not_negative

steps_rule = functools.partial(integer_rule, maximum=10**9)  # of optimizer steps, from `minimum` on


def as_tuple(value: Any) -> tuple[Any, ...]:
    """Returns a list of values as a tuple: of one value alone, and of None, too."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def probability_rule(value: Any) -> str | None:
    """Checks for a number in [0, 1) after rounding to a multiple of 1/65536, as in the kernels."""
    return None if is_number(value) and 0 <= round(value * 65536) < 65536 else "in [0, 1)"


def below_one_rule(value: Any) -> str | None:
    """Checks for a number between 0 and 1, neither of them included."""
    return None if is_positive(value) and value < 1 else "in (0, 1)"


def weight_rule(value: Any) -> str | None:
    """Checks for a weight of a loss, or None."""
    return f"{wanted}, or None for the default" if (wanted := not_negative(value)) else None


def bandwidths_rule(value: Any) -> str | None:
    """Checks for bandwidths of the MMD, or None."""
    valid = isinstance(value, tuple) and 1 <= len(value) <= 32 and all(map(is_positive, value))
    return None if valid else "1 to 32 positive numbers, or None"


def layers_rule(value: Any) -> str | None:
    """Checks for numbers of layers."""
    valid = isinstance(value, tuple) and all(is_whole(number, 0, MAX_SIZE) for number in value)
    return None if valid else "numbers of layers, from 0"


def blocks_rule(value: Any) -> str | None:
    """Checks for names of blocks."""
    valid = isinstance(value, tuple) and all(block in ("attention", "mlp") for block in value)
    return None if valid else 'of "attention" and "mlp", or empty for linear layers'


def tokens_rule(value: Any) -> str | None:
    """Checks for numbers of tokens, or lists of them by the names of modules."""
    lists = list(value.values()) if isinstance(value, Mapping) else [value] if value else []
    valid = not isinstance(value, Mapping) or all(isinstance(name, str) and name for name in value)
    for tokens in lists:
        numbers = isinstance(tokens, (tuple, list)) and all(is_whole(token, 0, 2**31) for token in tokens)
        valid = valid and numbers and 0 < len(set(tokens)) == len(tokens)
    return None if valid else "different numbers of tokens, from 0, or such lists by the names of modules"
