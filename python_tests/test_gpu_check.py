"""make gpu-check without a GPU: it says so; over stand-ins for its programs no failure is hidden; benchmarks run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import align_ext

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / ".ci"))
from gpu_check import ADDOPTS  # noqa: E402
from gpu_lines import LINES  # noqa: E402

GPU_CHECK = ROOT / ".ci/gpu_check.py"
ABOUT = "Paper GPU (1 GB), sm_90"
MODULES = sorted({need for line in LINES for need in line.needs if need.isidentifier()} - {"ncu"})
# Stands in for the environment's Python: $FACTS is what torch says, $TESTS what pytest prints; what has $BROKEN among
# its arguments fails, $CANNOT says that it cannot run here, $SLOW takes long.
PYTHON = """#!/bin/sh
case "$*" in *find_spec*) echo "$FACTS"; exit ;; esac
case "$*" in *"$BROKEN"*) echo "it broke"; exit 1 ;; esac
case "$*" in *"$CANNOT"*) echo "it cannot"; exit 77 ;; esac
case "$*" in *"$SLOW"*) sleep 60 ;; *"a stand-in"*) echo "========= ERROR SUMMARY: 0 errors" ;; esac
case "$*" in *pytest*) echo "$TESTS in 0.1s" ;; *) echo "figure: 1.05"; echo "a table" ;; esac
"""
SANITIZER = """#!/bin/sh
tool=none
while [ "${1#-}" != "$1" ]; do [ "$1" = --tool ] && tool=$2; shift 2; done
"$@" || exit 1
[ "$FINDS" = unsupported ] && { echo "========= Error: Device not supported"; exit 1; }
[ "$tool" = "$FINDS" ] && { echo "========= ERROR SUMMARY: 1 error"; exit 0; }
[ "$tool" = racecheck ] && echo "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)" && exit
[ "$FINDS" = nothing ] || echo "========= ERROR SUMMARY: 0 errors"
"""


def facts(gpus=2, memory=80.0, modules=(*MODULES, "pybind11", "setuptools"), extension=False):
    said = {"torch": "2.13.0", "CUDA": "13.0", "GPU": "Paper GPU (1 GB)", "arch": "sm_90", "purelib": "/nowhere"}
    return said | {"gpus": gpus, "GiB": memory, "modules": modules, "extension": extension}


@pytest.fixture
def gpu_check(tmp_path):
    """Runs the script over the stand-ins: (exit status, output, verdicts by line, results)."""
    import json

    programs = {"python": PYTHON, "compute-sanitizer": SANITIZER}
    for name, text in (programs | dict.fromkeys(("ncu", "cmake", "ninja"), "#!/bin/sh\n")).items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def run(*options, tools=("compute-sanitizer", "ncu"), machine=None, ended_at=None, **stand_ins):
        for name in {"compute-sanitizer", "ncu"} - {*tools}:
            (tmp_path / name).unlink()
        never = dict.fromkeys(("BROKEN", "CANNOT", "SLOW"), "never given")
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "CUDA_HOME": "/nowhere", "PYTHON": str(tmp_path / "python")}
        env |= {"FACTS": json.dumps(machine or facts()), "TESTS": "3 passed", "FINDS": ""} | never | stand_ins
        written = tmp_path / "results.md"
        command = [sys.executable, GPU_CHECK, "--write", written, *options]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
        if ended_at:
            while f"| {ended_at} |" not in process.stdout.readline():
                pass
            process.terminate()
        output, errors = process.communicate()
        assert errors == ""
        text = written.read_text()
        rows = [row.split(" | ") for row in text.splitlines() if row.count(" | ") == 5][1:]
        verdicts = {name: verdict for _, name, _, verdict, _, _ in rows}
        assert [*verdicts] == ["build", *(line.name for line in LINES)]
        return process.returncode, output, verdicts, text

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_cuda_device_it_says_so_in_one_sentence_and_exits_with_2():
    before = sorted((ROOT / "benchmarks").rglob("*.md"))
    result = subprocess.run([sys.executable, GPU_CHECK], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("gpu-check needs a CUDA device")
    assert result.stderr.count("\n") == 1
    assert sorted((ROOT / "benchmarks").rglob("*.md")) == before


def test_every_line_passes_where_all_is_there(gpu_check):
    status, output, verdicts, results = gpu_check()
    assert {*verdicts.values()} == {"passed"}
    assert status == 0
    assert f"{len(verdicts)} passed, 0 FAILED, 0 not run" in output
    assert "3 passed" in results
    assert "1.05" in results
    heads = re.findall(r"^## .*\n\n(.*)", results, re.M)
    assert len(heads) == 1 + sum(line.table for line in LINES)
    for head in heads:
        assert re.fullmatch(rf"{re.escape(ABOUT)}, driver .*, torch 2.13.0, CUDA 13.0, nvcc .*, commit .* UTC", head)


def test_a_line_that_fails_stops_no_other_one(gpu_check):
    status, output, verdicts, results = gpu_check(BROKEN="test_views")
    assert status == 1
    assert verdicts.pop("views") == "FAILED: exit status 1"
    assert {*verdicts.values()} == {"passed"}
    assert "1 FAILED" in output
    assert "## views: how it failed" in results
    assert "it broke" in results


def test_without_an_extension_nothing_is_checked(gpu_check):
    status, _, verdicts, _ = gpu_check(BROKEN="pip install")
    assert status == 1
    assert verdicts.pop("build").startswith("FAILED")
    assert {*verdicts.values()} == {"not run: the extension was not built"}


def test_without_what_builds_it_an_extension_is_taken_as_it_is(gpu_check):
    bare = facts(modules=[], extension=True)
    status, _, verdicts, _ = gpu_check("build", machine=bare, BROKEN="pip install")
    assert (status, verdicts["build"]) == (0, "passed")
    status, _, verdicts, _ = gpu_check("build", machine=bare, BROKEN="built elsewhere")
    assert (status, verdicts["build"]) == (1, "FAILED: exit status 1")


def test_with_torch_nvcc_and_pytest_alone_the_operators_are_checked_and_the_rest_says_what_it_needs(gpu_check):
    assert {"transformers", "trl", "peft", "unsloth", "hypothesis", "regex"} <= {*MODULES}
    status, _, verdicts, _ = gpu_check(machine=facts(modules=[]))
    assert status == 0
    for line in LINES:
        lacks = [need for need in line.needs if need in MODULES]
        assert verdicts[line.name] == (f"not run: needs {', '.join(lacks)}" if lacks else "passed")
        assert not lacks or line.group not in ("streams and memory", "compute-sanitizer", "kernels")


def test_a_smaller_machine_is_told_what_it_lacks(gpu_check):
    status, _, verdicts, _ = gpu_check(machine=facts(gpus=1, memory=23.0))
    assert status == 0
    assert verdicts["second device"] == "not run: needs 2 GPUs: found 1"
    assert verdicts["large"] == "not run: needs 40 GiB of memory: 23 are free"


@pytest.mark.skipif(os.path.exists("/usr/bin/compute-sanitizer"), reason="it is on the PATH that sh and git need")
def test_missing_tools_are_named(gpu_check):
    status, _, verdicts, _ = gpu_check(tools=())
    assert status == 0
    assert verdicts["kernel bytes"] == "not run: needs Nsight Compute (ncu)"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        assert verdicts[tool].startswith("not run: needs compute-sanitizer")


def test_what_a_sanitizer_finds_is_a_failure(gpu_check):
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        status, _, verdicts, results = gpu_check("compute-sanitizer", FINDS=tool)
        assert status == 1
        assert verdicts[tool] == "FAILED: findings"
        assert [*verdicts.values()].count("passed") == 4  # the build among them
        assert "ERROR SUMMARY: 1 error" in results


def test_a_sanitizer_without_a_summary_or_a_device_has_not_passed(gpu_check):
    status, _, verdicts, _ = gpu_check("memcheck", FINDS="nothing")
    assert (status, verdicts["memcheck"]) == (1, "FAILED: the tool made no summary")
    status, _, verdicts, _ = gpu_check("memcheck", FINDS="unsupported")
    assert (status, verdicts["memcheck"]) == (0, "not run: compute-sanitizer does not support this device")


def test_tests_that_did_not_run_are_not_passed(gpu_check):
    _, _, verdicts, _ = gpu_check("views", TESTS="SKIPPED [7] here.py:3: no such thing\n7 skipped")
    assert verdicts["views"] == "not run: no such thing"
    _, _, verdicts, _ = gpu_check("views", TESTS="7 deselected")
    assert verdicts["views"] == "FAILED: no test ran"


def test_a_script_says_itself_that_it_cannot_run_here(gpu_check):
    status, _, verdicts, _ = gpu_check("kernel bytes", CANNOT="--ncu")
    assert (status, verdicts["kernel bytes"]) == (0, "not run: it cannot")


def test_what_was_not_asked_for_did_not_run(gpu_check):
    _, _, verdicts, _ = gpu_check("graphs", "Trainer")
    passed = {name for name, verdict in verdicts.items() if verdict == "passed"}
    assert passed == {"build", "CUDA graphs", "Trainer", "SFTTrainer"}
    assert {*verdicts.values()} == {"passed", "not run: not asked for"}


def test_when_the_time_is_up_the_rest_did_not_run(gpu_check):
    status, _, verdicts, _ = gpu_check("--seconds", "3", SLOW="test_views")
    assert status == 0
    names = [*verdicts]
    for name in names[names.index("views") :]:
        assert verdicts[name] == "not run: the time was up"


def test_a_run_that_is_ended_keeps_what_it_has(gpu_check):
    status, output, verdicts, _ = gpu_check(SLOW="test_views", ended_at="second device")
    assert status == 0
    assert output.startswith("interrupted")
    assert verdicts["second device"] == "passed"
    names = [*verdicts]
    for name in names[names.index("views") :]:
        assert verdicts[name] == "not run: not reached"


def test_a_dry_run_goes_through_every_line_and_says_that_nothing_ran_on_a_gpu(gpu_check, tmp_path):
    (tmp_path / "_C.so").touch()
    machine = facts(gpus=0) | {"GPU": None}
    status, output, verdicts, results = gpu_check(
        "--dry-run", tools=(), machine=machine, ALIGN_SIMT_EXTENSION=str(tmp_path / "_C.so")
    )
    assert status == 0
    assert {*verdicts.values()} == {"dry run: passed"}
    assert output.endswith("This was a dry run: nothing ran on a GPU.\n")
    assert results.startswith("# DRY RUN: nothing ran on a GPU")
    assert all("nothing ran on a GPU" in head for head in re.findall(r"^## .*\n\n(.*)", results, re.M))


def test_a_dry_run_needs_an_engine():
    env = {name: value for name, value in os.environ.items() if name != "ALIGN_SIMT_EXTENSION"}
    result = subprocess.run([sys.executable, GPU_CHECK, "--dry-run"], capture_output=True, check=False, env=env)
    assert result.returncode == 2
    assert b"ALIGN_SIMT_EXTENSION" in result.stderr


def test_the_lines_name_tests_and_scripts_that_there_are():
    for line in LINES:
        for argument in re.findall(r"[\w/]+\.(?:py|csv)(?:::\w+)?", " ".join([line.code, *line.arguments, *line.dry])):
            path, _, test = argument.partition("::")
            assert (ROOT / path).is_file(), line.name
            assert not test or f"def {test}(" in (ROOT / path).read_text(), line.name
    tested = {test for line in LINES for test in re.findall(r"python_tests/gpu/(test_\w+)", " ".join(line.arguments))}
    assert tested == {path.stem for path in (ROOT / "python_tests/gpu").glob("test_*.py")}


@pytest.mark.slow
def test_a_dry_run_on_the_engine_passes(native_build, tmp_path):
    (extension,) = native_build.glob("_C.*.so")
    env = os.environ | {"ALIGN_SIMT_EXTENSION": str(extension), "PYTHON": sys.executable}
    command = [sys.executable, GPU_CHECK, "--dry-run", "--write", tmp_path / "results.md"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    print(result.stdout)
    assert result.returncode == 0
    assert " 0 FAILED" in result.stdout


BARE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in %r:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def test_the_operators_tests_need_torch_and_pytest_alone(tmp_path):
    package = Path(align_ext.__file__).parents[1]  # the one that is tested: not the sources, if it is installed
    bare = {*MODULES, "typer", "xdist", "numpy", "scipy", "pybind11"}
    (tmp_path / "sitecustomize.py").write_text(BARE % (bare,))
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    env["PYTHONPATH"] = os.pathsep.join(map(str, (tmp_path, package, ROOT / "python_tests")))
    assert subprocess.run([sys.executable, "-c", "import regex"], capture_output=True, check=False, env=env).returncode
    options = ("-q", "-p", "no:cacheprovider", "-o", ADDOPTS, "--every", "500", "-k", "hand_computed")
    command = [sys.executable, "-m", "pytest", *options, ROOT / "python_tests/ops"]
    command += ["--ignore", ROOT / "python_tests/ops/test_arguments.py"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert re.search(r"^[5-9] passed", result.stdout, re.M), result.stdout


FASTEST = "bench_mk_mmd"
BENCHMARKS = sorted((ROOT / "benchmarks").glob("bench_*.py"))


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem == FASTEST else pytest.mark.slow, id=path.stem) for path in BENCHMARKS],
)
def test_the_benchmarks_run(path):
    result = subprocess.run([sys.executable, path, "--quick"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    firsts = ("frozen layer alone", "the frozen product first", "pairs in plain PyTorch", "training step",
              "an operator a layer")  # fmt: skip
    assert any(first in result.stdout for first in firsts)
