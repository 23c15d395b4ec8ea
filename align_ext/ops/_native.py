"""Loads the compiled extension, which registers the operators `torch.ops.align_ext.*`."""

import torch  # noqa: F401  (loads libtorch, which the extension links to without a path of its own)

try:
    from align_ext import _C
except ImportError as error:
    raise ImportError(
        "align_ext's compiled extension align_ext._C is missing or does not load "
        f"({error}). Build it: `pip install .` (or `pip install -e .`) in the source folder, with torch >= 2.11 "
        "installed first."
    ) from error

__all__ = ["_C"]
