"""Finds the torch to build against, without importing it."""

import os
import re
import site
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

MINIMUM = "2.11"
_HEADER = "include/torch/csrc/stable/library.h"


class Torch(NamedTuple):
    """A torch package: its folder and version."""

    folder: Path
    version: str


def _candidates() -> list[Path]:
    """sys.path, then the environment pip installs into: under build isolation sysconfig still names it."""
    paths = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    paths += [*site.getsitepackages(), site.getusersitepackages()]
    return [Path(path or os.curdir) / "torch" for path in paths]


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:2])


def find_torch() -> Torch | None:
    """The first torch of at least MINIMUM that carries the stable-ABI headers, or None."""
    for folder in _candidates():
        try:
            text = (folder / "version.py").read_text()
        except OSError:
            continue
        match = re.search(r"__version__ = ['\"]([^'\"]+)", text)
        if match and _release(match[1]) >= _release(MINIMUM) and (folder / _HEADER).exists():
            return Torch(folder, match[1])
    return None
