"""How values, paths and errors stand in messages: one printable line each."""

import os
import reprlib
from typing import Any


def shown(value: Any, maximum: int = 80) -> str:
    """Returns a value's repr for a message: one line of printable characters, cut in the middle."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = maximum
    short.maxlist = short.maxtuple = short.maxdict = short.maxset = short.maxfrozenset = 12
    try:
        return line(short.repr(value), maximum)
    except ValueError:  # an integer of thousands of digits
        return f"<{type(value).__name__}>"


def shown_path(path: str | os.PathLike[str]) -> str:
    """Returns a path for a message, in full unless it is very long."""
    return line(os.fspath(path), 300)


def reason_of(error: BaseException) -> str:
    """Returns the reason of an exception as one line of limited length; of an OSError only its strerror."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return line(text, 300)


def line(text: str, maximum: int) -> str:
    """Returns text as one line of limited length, cut in the middle; characters that cannot be printed are escaped."""
    text = text if len(text) <= 4 * maximum else f"{text[: 2 * maximum]} {text[-2 * maximum :]}"
    text = " ".join(text.split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return text if len(text) <= maximum else f"{text[: maximum // 2]} ... {text[-(maximum // 2 - 5) :]}"
