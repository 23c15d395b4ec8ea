"""What the value of an option may be: sizes that memory holds, numbers that float32 holds, known names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from align_ext.system.reading import shown

MOST = 65_536  # of an integer that is the size of something
_LARGEST = 1e30  # of a number: float32 holds it, and its product with a weight


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
