"""Builds and runs the C++ tests: the kernels without torch."""

import platform
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "cpp_tests").glob("test_*.cpp"))
if platform.system() == "Linux" and platform.machine() == "x86_64":  # the same tests of the kernels of bfloat16 units
    emulated = re.search(r"foreach\(name ([^)]*)\)", (ROOT / "cpp_tests/CMakeLists.txt").read_text())[1]
    NAMES += [f"{name}_emulated" for name in emulated.split()]


@pytest.mark.parametrize("name", NAMES)
def test_the_cpp_tests_pass(native_build, name):
    command = ["ctest", "--test-dir", native_build, "-R", f"^{name}$", "--output-on-failure", "--verbose"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    passed, failed = map(int, re.search(r"(\d+) passed, (\d+) failed", result.stdout).groups())
    print(f"{name}: {passed} checks passed")
    assert passed > 0
    assert failed == 0
