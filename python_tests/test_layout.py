"""The shape of the repository is a promise to the reader; this file keeps it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = sorted(path.stem for path in (ROOT / "align_ext/ops").glob("[!_]*.py"))
HOMES = [
    "csrc/ops/{}.h",
    "csrc/cpu/{}.cpp",
    "csrc/bindings/{}.cpp",
    "align_ext/reference/{}.py",
    "python_tests/ops/test_{}.py",
    "cpp_tests/test_{}.cpp",
    "benchmarks/bench_{}.py",
]
CUDA_OPS = {
    "dropout_sum",
    "gaussian_kl",
    "grouped_lora",
    "mk_mmd",
    "routed_lora",
    "sibling_lora",
}  # operators with CUDA kernels
NOT_OPS = {"build_info", "library", "projection", "threads"}  # beside the operators' files in csrc
TOP_LEVEL = {
    "csrc", "align_ext", "python_tests", "cpp_tests", "benchmarks", "examples", "docs", "build_support", ".ci",
    "CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "CITATION.cff",
    "LICENSE", "Makefile", ".gitignore", ".clang-format",
}  # fmt: skip
SOURCES = ("*.py", "*.cpp", "*.cu", "*.cuh", "*.h")


def sources(*folders):
    for folder in folders:
        for pattern in SOURCES:
            yield from (ROOT / folder).rglob(pattern)


def tracked():
    import subprocess

    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    return [ROOT / line for line in listing.stdout.splitlines()]


def test_there_are_the_operators_that_the_layout_speaks_of():
    assert OPS == ["dropout_sum", "gaussian_kl", "grouped_lora", "mk_mmd", "routed_lora", "sibling_lora"]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("home", HOMES)
def test_every_op_has_the_same_homes(op, home):
    assert (ROOT / home.format(op)).is_file()


@pytest.mark.parametrize("op", sorted(CUDA_OPS))
def test_an_op_with_cuda_kernels_has_their_homes_too(op):
    assert (ROOT / f"csrc/cuda/{op}.cu").is_file()


@pytest.mark.parametrize("pattern", ["csrc/cuda/*.cu", "csrc/bindings/*.cpp"])
def test_no_home_without_an_op(pattern):
    assert {path.stem for path in ROOT.glob(pattern)} - NOT_OPS == CUDA_OPS


@pytest.mark.parametrize("folder", ["csrc/ops", "csrc/cuda", "csrc/cpu", "cpp_tests"])
def test_torch_stays_in_bindings(folder):
    for path in sources(folder):
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", path.read_text()), path


def test_headers_of_the_native_api_know_neither_torch_nor_cuda():
    for path in (ROOT / "csrc/ops").glob("*.h"):
        assert not re.search(r"#include\s*[<\"](cuda|torch|ATen|c10)", path.read_text()), path


def test_only_launch_cuh_knows_the_compiler():
    for path in (ROOT / "csrc/cuda").glob("*.cu*"):
        if path.name != "launch.cuh":
            assert not re.search(r"<<<|__CUDACC__", path.read_text()), path


def test_only_ptx_cuh_holds_assembly():
    for path in (ROOT / "csrc").rglob("*.cu*"):
        if path.name != "ptx.cuh":
            assert not re.search(r"\basm\b", path.read_text()), path


def test_bindings_call_torch_by_names_that_mean_the_same_in_every_version():
    """torch::stable's functions gain overloads (view by dtype in 2.14); tensors.h names operators and overloads."""
    for path in (ROOT / "csrc/bindings").iterdir():
        calls = set(re.findall(r"torch::stable::(\w+)\(", path.read_text()))
        assert calls <= {"parallel_for"}, path
        assert len(re.findall("aoti_torch_empty", path.read_text())) == (path.name == "tensors.h"), path


def test_no_float_atomics_in_cuda_kernels():
    for path in (ROOT / "csrc/cuda").glob("*.cu*"):
        assert "atomicAdd" not in path.read_text(), path


def test_the_top_level_is_fixed():
    names = {path.relative_to(ROOT).parts[0] for path in tracked()}
    assert "README.md" in names
    assert names <= TOP_LEVEL


@pytest.mark.parametrize("path", sorted(sources("csrc", "align_ext", "cpp_tests", "python_tests", "benchmarks")))
def test_files_hold_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400, f"{path} outgrew one idea: split it by idea"


def test_nothing_unsafe_is_loaded():
    unsafe = re.compile(r"torch\.load\(|pickle\.load|yaml\.load\(|trust_remote_code\s*=\s*True|\beval\(|\bexec\(")
    for path in sources("align_ext"):
        lines = [line for line in path.read_text().splitlines() if ".eval()" not in line]
        assert not unsafe.search("\n".join(lines)), path


def test_ops_write_out_their_formula_in_the_header():
    for op in OPS:
        header = (ROOT / f"csrc/ops/{op}.h").read_text()
        assert "Backward" in header or "gradient" in header
        assert "[tokens" in header
