"""Names that users give, and patterns that match them, checked once for all."""

import functools
import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import regex

from align_ext.system.messages import reason_of, shown

_MAX_PATTERN = 2000  # the most characters of a regular expression
_MAX_COUNT = 1000  # the largest product of its counts {n}, which is how often compilation repeats its content
_MAX_NAME, _MAX_FOLDER = 1000, 200  # the most bytes of a name, and of a folder's name
_SECONDS = 0.5  # the time that one Matcher may take in all
_SAME_AS_RE = "([:=!#)aimsux-]|<[=!]|P[<=>])"  # syntax after "(?" with the same meaning in the modules regex and re


def check_pattern(pattern: str) -> None:
    """Checks that a regular expression means the same in re and regex, and that its compiled form is small.

    Raises:
        ValueError: it is not, or it is too large.
    """
    try:
        _compiled(pattern)
    except (regex.error, OverflowError, RecursionError, MemoryError, ValueError) as error:
        raise ValueError(f"{shown(pattern)} is no regular expression: {reason_of(error)}") from error


class Matcher:
    """Matches regular expressions with names; all matches of one Matcher together may take half a second."""

    def __init__(self) -> None:
        self._seconds_left = _SECONDS

    def matches(self, pattern: str, name: str, *, end: bool = False) -> bool:
        """Whether a pattern matches a whole name, or with `end` a whole name or everything after one of its dots.

        Raises:
            ValueError: it is not a regular expression, or the time is over.
        """
        check_pattern(pattern)
        start, fit = time.perf_counter(), _compiled(rf"(.*\.)?({pattern})" if end else pattern).fullmatch
        try:
            return fit(name, timeout=max(self._seconds_left, 1e-3)) is not None
        except (TimeoutError, MemoryError) as error:
            raise ValueError(
                f"the pattern {shown(pattern)} takes too long for {shown(name)}: write one without nested "
                "repetitions, or list the names"
            ) from error
        finally:
            if (spent := time.perf_counter() - start) > 1e-3:  # shorter times cannot add up to much
                self._seconds_left -= spent

    def value_of(self, patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        """The value of the first pattern that is a name, or matches all of it after one of its dots: PEFT's rule."""
        return next((x for p, x in patterns.items() if p == name or self.matches(p, name, end=True)), default)


def layer_index(name: str, lists: Sequence[str] = ()) -> int | None:
    """Returns the number of the layer that a module is in: the first of its name, or the one after a list's name."""
    for pattern in [rf"\.{re.escape(one)}\.(\d+)\." for one in lists] or [r"\.(\d+)\."]:
        if found := re.search(pattern, f".{name}"):
            return int(found[1])
    return None


def shortest_ends(names: Iterable[str], others: Iterable[str]) -> tuple[str, ...]:
    """Returns the shortest suffixes of module names, as patterns, that match all of these and none of the others."""
    taken = {end for other in others for end in _ends(other)}
    return tuple(dict.fromkeys(next((end for end in _ends(name) if end not in taken), name) for name in names))


def _ends(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[-n:]) for n in range(1, len(parts) + 1))


def check_names(names: Any, what: str, *, maximum: int = 10_000, for_folders: bool = False) -> tuple[str, ...]:
    """Checks names from a file: a list of different, printable strings of 1 to 1,000 bytes.

    Args:
        names: the value from the file.
        what: the first words of an error message.
        maximum: the largest number of names.
        for_folders: each name must also be a valid folder name: at most 200 bytes, no slash, not "." or "..".

    Returns:
        The names.

    Raises:
        ValueError: they are not such names.
    """
    if not isinstance(names, (list, tuple)) or len(names) > maximum:
        raise ValueError(f"{what}={shown(names)} must be a list of at most {maximum} names")
    for name in names:
        if reason := _invalid_name_reason(name, for_folders=for_folders):
            raise ValueError(f"{what}: {shown(name)} is no name{' for a folder' * for_folders}: {reason}")
    if (duplicate := _first_duplicate(names)) is not None:
        raise ValueError(f"{what}: {shown(duplicate)} is there twice")
    return tuple(names)


def _invalid_name_reason(name: Any, *, for_folders: bool) -> str | None:
    if not isinstance(name, str):
        return f"it is a {type(name).__name__}, not text"
    maximum = _MAX_FOLDER if for_folders else _MAX_NAME
    if not 1 <= len(name[: maximum + 1].encode("utf-8", "surrogatepass")) <= maximum or name != name.strip():
        return f"a name has 1 to {maximum} bytes and no space at its ends"
    if not name.isprintable():
        return "a name is printable"
    if for_folders and (name in (".", "..") or "/" in name or "\\" in name):
        return "a folder's name is not . or .. and holds no slash"
    return None


def _first_duplicate(items: Iterable[Any]) -> Any:
    """Returns the first item that occurs a second time, or None."""
    seen = set()
    for item in items:
        if item in seen:
            return item
        seen.add(item)
    return None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: str) -> regex.Pattern[str]:
    """Compiles a pattern of bounded size; refuses syntax that re lacks (group calls, fuzzy matching, properties)."""
    if len(pattern) > _MAX_PATTERN + 20:
        raise ValueError(f"it is longer than {_MAX_PATTERN} letters")
    plain = re.sub(r"\\[^pPNLgGKRX]", "", pattern)
    if unknown := re.search(rf"\\.|\(\?(?!{_SAME_AS_RE}).?|\{{(?!\d*,?\d*\}}).?", plain):
        raise ValueError(f"it holds {unknown[0]!r}")
    counts = [max(int(count[:9] or 1) for count in pair) for pair in re.findall(r"\{(\d*),?(\d*)\}", plain)]
    if math.prod(max(count, 1) for count in counts) > _MAX_COUNT:
        raise ValueError(f"its counts multiply to more than {_MAX_COUNT}")
    return regex.compile(pattern)
