"""Makes the extension at $ALIGN_SIMT_EXTENSION align_ext._C: CUDA kernels on CPU tensors, run by cpp_tests/simt.

    pytest -p simt_extension --device simt python_tests/ops        (with python_tests on PYTHONPATH)

or `import simt_extension` before align_ext. A process has one align_ext._C, so this one needs a process of its own.
(Any other build of the extension can be tried so, without --device simt: .ci/sanitize.)
"""

import importlib.util
import os
import sys

import torch  # noqa: F401  (loads libtorch, which the extension links to without a path of its own)

_NAME = "align_ext._C"
if _NAME in sys.modules:
    raise ImportError("simt_extension must be imported before align_ext")
_spec = importlib.util.spec_from_file_location(_NAME, os.environ["ALIGN_SIMT_EXTENSION"])
extension = sys.modules[_NAME] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(extension)
launches = getattr(extension, "launches", lambda: 0)  # () -> how many kernels the engine has run


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"SIMT engine: {launches()} kernels")
