"""Loads the compiled extension, which registers the operators `torch.ops.align_ext.*`."""

from importlib import import_module
from typing import Any

import torch  # noqa: F401  (loads libtorch, which the extension links to without a path)

try:
    # Not an import statement: import-linter would take it for an import of the whole package, above all layers.
    build_info: Any = import_module(
        "align_ext._C"
    )  # built_with_torch, compiler, cuda_archs, vector_bytes(), bfloat16_unit()
except ImportError as error:
    raise ImportError(
        f"align_ext's compiled extension align_ext._C is missing or does not load ({error}). Build it: `pip install .` "
        "(or `pip install -e .`) in the source folder, with torch >= 2.11 installed first."
    ) from error
