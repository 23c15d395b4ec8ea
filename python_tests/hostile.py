"""What a refusal looks like: one printable line below 500 letters, within two seconds."""

import time

import pytest


def check_line(error):
    """Checks the message of a ValueError."""
    text = str(error)
    assert 0 < len(text) < 500, text
    assert text.isprintable(), ascii(text)


def refused(call, *arguments, match=""):
    """The one line that a call answers with."""
    start = time.perf_counter()
    with pytest.raises(ValueError, match=match) as error:
        call(*arguments)
    assert time.perf_counter() - start < 2
    check_line(error.value)
    return str(error.value)
