"""Versions of Python and of the packages that matter for a result."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Returns the versions that a result depends on."""
    modules = ("torch", "transformers", "peft")
    return {"align_ext": version("align_ext"), "python": platform.python_version(), **{m: version(m) for m in modules}}
