"""make gpu-check without a GPU: it says so, and over stand-ins for its tools it hides no failure. Benchmarks run."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# Stands in for the environment's Python and for compute-sanitizer; $TESTS is what pytest prints.
PYTHON = """#!/bin/sh
case "$*" in
  *get_device_name*) echo "Paper GPU (1 GB)" ;;
  *bench_*) echo "a table" ;;
  *pytest*) echo "$TESTS in 0.1s" ;;
esac
"""
SANITIZER = """#!/bin/sh
tool=none
while [ "${1#-}" != "$1" ]; do [ "$1" = --tool ] && tool=$2; shift 2; done
"$@" || exit 1
[ "$tool" = "$FINDS" ] && { echo "========= ERROR SUMMARY: 1 error"; exit 1; }
[ "$tool" = racecheck ] && echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" && exit
[ "$FINDS" = nothing ] || echo "========= ERROR SUMMARY: 0 errors"
"""


@pytest.fixture
def gpu_check(tmp_path):
    """Runs a copy of the script over the stand-ins: (exit status, output, results)."""
    stubs = tmp_path / "bin"
    for folder in (".ci", "benchmarks", "bin"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / ".ci/gpu-check", tmp_path / ".ci")
    (tmp_path / "benchmarks/bench_some_op.py").touch()
    for name, text in {"python": PYTHON, "align-lora": "#!/bin/sh\n", "compute-sanitizer": SANITIZER}.items():
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)

    def run(tests="3 passed", finds="", sanitizer=True):
        if not sanitizer:
            (stubs / "compute-sanitizer").unlink()
        env = {"PATH": f"{stubs}:/usr/bin:/bin", "CUDA_HOME": "/nowhere", "TESTS": tests, "FINDS": finds}
        script = tmp_path / ".ci/gpu-check"
        result = subprocess.run([script], capture_output=True, text=True, check=False, env=env)
        return result.returncode, result.stdout, (tmp_path / "benchmarks/results/gpu-paper-gpu-1-gb.md").read_text()

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_it_says_so_in_one_sentence_and_exits_with_2():
    before = sorted((ROOT / "benchmarks").rglob("*.md"))
    env = os.environ | {"PYTHON": sys.executable}
    result = subprocess.run([ROOT / ".ci/gpu-check"], capture_output=True, text=True, check=False, env=env)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("gpu-check needs a CUDA device")
    assert result.stderr.count("\n") == 1
    assert sorted((ROOT / "benchmarks").rglob("*.md")) == before


def test_it_passes_when_every_check_does(gpu_check):
    status, output, results = gpu_check()
    assert status == 0, output
    assert output.count("ok  ") == 8
    assert "0 failed or missing" in results
    assert results.count(": 3 passed") == 4
    assert "a table" in results


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_what_a_sanitizer_finds_is_a_failure(gpu_check, tool):
    status, output, results = gpu_check(finds=tool)
    assert status == 1
    for text in (output, results):
        assert f"FAILED  {tool} finds nothing" in text
        assert "1 failed or missing" in text
    assert "ERROR SUMMARY: 1 error" in results


def test_a_sanitizer_without_a_summary_is_a_failure(gpu_check):
    status, output, _ = gpu_check(finds="nothing")
    assert status == 1
    assert "FAILED  memcheck finds nothing" in output


def test_tests_that_were_all_skipped_are_a_failure(gpu_check):
    status, output, _ = gpu_check(tests="7 skipped")
    assert status == 1
    assert "FAILED  the operators' tests pass on the GPU (0 s): 7 skipped" in output


@pytest.mark.skipif(bool(shutil.which("compute-sanitizer", path="/usr/bin:/bin")), reason="it is not missing here")
def test_a_missing_sanitizer_is_missing_not_passed(gpu_check):
    status, output, results = gpu_check(sanitizer=False)
    assert status == 1
    assert "MISSING compute-sanitizer" in results
    assert "memcheck finds nothing" not in output


FASTEST = "bench_mk_mmd"
BENCHMARKS = sorted((ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == FASTEST else pytest.mark.slow, id=path.stem) for path in BENCHMARKS],
)
def test_the_benchmarks_run(path):
    result = subprocess.run([sys.executable, path, "--quick"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert any(first in result.stdout for first in ("frozen layer alone", "pairs in plain PyTorch", "training step"))
