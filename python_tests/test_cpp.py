"""Builds and runs the C++ tests: the kernels without torch."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "cpp_tests").glob("test_*.cpp"))


def run(*command, **options):
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp")
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DALIGN_TESTS=ON")
    run("cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_cpp_tests_pass(build, name):
    output = run("ctest", "--test-dir", build, "-R", f"^{name}$", "--output-on-failure", "--verbose")
    passed, failed = map(int, re.search(r"(\d+) passed, (\d+) failed", output).groups())
    print(f"{name}: {passed} checks passed")
    assert passed > 0
    assert failed == 0
