"""Loads the compiled extension, which registers the operators `torch.ops.align_ext.*`."""

from importlib import import_module
from typing import Any

import torch  # noqa: F401  (loads libtorch, which the extension links to without a path of its own)

try:
    # Not an import statement: to import-linter that would be one of the whole package, on top of the layers.
    build_info: Any = import_module(
        "align_ext._C"
    )  # built_with_torch, compiler, cuda_archs, vector_bytes(), uses_amx()
except ImportError as error:
    raise ImportError(
        f"align_ext's compiled extension align_ext._C is missing or does not load ({error}). Build it: `pip install .` "
        "(or `pip install -e .`) in the source folder, with torch >= 2.11 installed first."
    ) from error
