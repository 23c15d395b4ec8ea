"""PEP 517 backend: setuptools, plus torch as a build requirement only where the target environment has none.

A fixed build requirement on torch would download a second torch into pip's isolated build environment.
"""

from typing import Any

from find_torch import find_torch
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

Settings = dict[str, Any] | None


def _torch() -> list[str]:
    return [] if find_torch() else ["torch==2.13.0"]


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Setuptools' requirements, and torch if there is none."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch()


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Setuptools' requirements, and torch if there is none."""
    return build_meta.get_requires_for_build_editable(config_settings) + _torch()
