"""What all tests share, and where the operators' tests run: `pytest python_tests/ops --device cpu|cuda|simt`.

cpu (default) is the CPU kernels, cuda the CUDA kernels on the first GPU, simt the CUDA kernels on tensors of the CPU,
executed by the engine of cpp_tests/simt in an extension that was built with it. Tests make their tensors on the CPU and
move what the operator gets to `device`; the reference stays on the CPU. What a device lacks (LACKS) is marked where a
test needs it, `@pytest.mark.needs("float64")` or `pytest.param(..., marks=...)`; there the test is skipped with the
reason.
"""

import gc
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: the tests run in several processes

import pytest
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[1]
CUDA_LACKS = {
    "float64": "the CUDA kernels have no float64",
    "values": "group and offsets are checked inside the CUDA kernels: a bad value is no Python error",
}
LACKS = {"cpu": {}, "cuda": CUDA_LACKS, "simt": CUDA_LACKS | {"size": "too large for the SIMT engine"}}


def pytest_addoption(parser):
    parser.addoption("--device", choices=LACKS, default="cpu", help="where the operators' tests run")
    parser.addoption("--slow", action="store_true", help="also run what only make check-full has time for")
    parser.addoption("--every", type=int, default=1, help="run only every n-th case of each test")
    parser.addoption("--fuzz", type=int, default=40, help="how many cases a test by hypothesis makes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: runs with --slow alone, since faster tests see most of the same")
    config.addinivalue_line("markers", "needs(what): skipped on a --device that lacks it (conftest.LACKS)")
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")
    try:
        import hypothesis
    except ModuleNotFoundError:  # the operators' tests need nothing but pytest
        return
    options = {"max_examples": config.getoption("--fuzz"), "derandomize": True, "deadline": None, "database": None}
    hypothesis.settings.register_profile("align", **options, suppress_health_check=list(hypothesis.HealthCheck))
    hypothesis.settings.load_profile("align")


def pytest_collection_modifyitems(config, items):
    # What takes longest starts first, so that no process is left alone with it.
    items.sort(key=lambda item: "native_build" not in getattr(item, "fixturenames", ()))
    slow = [] if config.getoption("--slow") else [item for item in items if item.get_closest_marker("slow")]
    config.hook.pytest_deselected(items=slow)
    items[:] = [item for item in items if item not in slow]
    seen, every = Counter(), config.getoption("--every")
    for item in items[:]:
        test = (item.path, getattr(item, "originalname", item.name))
        if seen[test] % every:
            items.remove(item)
        seen[test] += 1
    lacks = LACKS[config.getoption("--device")]
    for item in items:
        for mark in list(item.iter_markers("needs")):
            for what in mark.args:
                if what in lacks:
                    item.add_marker(pytest.mark.skip(reason=lacks[what]))


def pytest_collection_finish():
    """Keeps the collector from walking all that was imported, which it does in half a second of each Trainer.train."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def device(request):
    """Where an operator's arguments are."""
    name = request.config.getoption("--device")
    if name == "simt":
        from align_ext.ops._native import build_info

        assert hasattr(build_info, "launches"), "--device simt: align_ext._C was built without ALIGN_SIMT"
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


@pytest.fixture(scope="session")
def native_build(tmp_path_factory):
    """A build folder of the C++ tests, and of the extension whose CUDA kernels the SIMT engine runs; built once."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    parent = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()
    folder = parent / "native"
    with FileLock(parent / "native.lock"):
        build(folder)  # which has nothing to do the second time
    return folder


def build(folder):
    """Builds the C++ tests and the SIMT extension."""
    import pybind11

    options = {
        "ALIGN_TESTS": "ON",
        "ALIGN_SIMT": "ON",
        "ALIGN_TORCH_DIR": Path(torch.__file__).parent,
        "ALIGN_TORCH_VERSION": torch.__version__,
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *(f"-D{k}={v}" for k, v in options.items())]
    for command in configure, ["cmake", "--build", folder, "--parallel", str(os.cpu_count() or 1)]:
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"


@pytest.fixture
def unused_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]
