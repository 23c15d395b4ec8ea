"""The doctor says what to do where driver, torch and extension do not go together."""

import io
import subprocess

import pytest
from rich.console import Console

from align_ext.diagnostics import doctor
from align_ext.diagnostics.cuda_versions import CudaVersions, driver_version, installed_versions, parse

ARCHS = ("75-real", "80-real", "90-real", "100-real", "120")
H100, RTX_4090, RTX_5090, P100, NEXT = (9, 0), (8, 9), (12, 0), (6, 0), (13, 0)


def versions(driver=(13, 0), torch=(13, 0), toolkit=(13, 0), archs=ARCHS, devices=(H100,)):
    return CudaVersions(driver, torch, toolkit, archs, devices)


SOUND = {
    "all the same": versions(),
    "no GPU, and nothing for one": versions(None, None, None, (), ()),
    "no GPU, and a torch without CUDA": versions(None, None, (13, 0), ARCHS, ()),
    "a newer driver": versions(driver=(14, 1)),
    "a driver of the same major version runs machine code": versions(driver=(13, 0), torch=(13, 2), toolkit=(13, 2)),
    "torch and the extension by other toolkits": versions(driver=(13, 1), torch=(12, 8), toolkit=(13, 0)),
    "machine code of an older GPU of the same major version": versions(devices=(RTX_4090,)),
    "PTX of the driver's own version": versions(devices=(NEXT,)),
    "architectures that CMake chose": versions(archs=("native",), devices=(P100,)),
}


@pytest.mark.parametrize("name", SOUND)
def test_what_goes_together_needs_no_advice(name):
    assert SOUND[name].advice() is None


# versions, whether something is broken, the sentence with its cure
UNSOUND = {
    "no driver": (
        versions(driver=None, devices=()), False,
        "no NVIDIA driver was found, so that all runs on the CPU; for a GPU, install a driver that runs CUDA 13.0 or "
        "newer",
    ),
    "no driver, the extension's CUDA the newer one": (
        versions(driver=None, torch=(12, 8), devices=()), False, "that runs CUDA 13.0 or newer",
    ),
    "a driver older than torch's CUDA": (
        versions(driver=(12, 4), devices=()), True,
        "the driver runs CUDA up to 12.4, but torch needs 13.0: update the driver, or install a torch for CUDA 12.4 or "
        "older",
    ),
    "a torch without CUDA beside a driver": (
        versions(torch=None, devices=()), False,
        "this torch is a CPU build, but the driver runs CUDA up to 13.0: install a torch for CUDA 13.0 or older, then "
        "this package again",
    ),
    "an extension without CUDA": (
        versions(toolkit=None, archs=()), False,
        "the extension was built without CUDA kernels: put nvcc of CUDA 13.0 or older on PATH and run `pip install .` "
        "again",
    ),
    "an extension's toolkit newer than the driver": (
        versions(driver=(12, 8), torch=(12, 8)), True,
        "the driver runs CUDA up to 12.8, but the extension was built by nvcc 13.0: update the driver, or run `pip "
        "install .` again with an nvcc that is no newer",
    ),
    "PTX of a toolkit newer than the driver": (
        versions(driver=(13, 0), toolkit=(13, 1), devices=(NEXT,)), True, "the extension was built by nvcc 13.1",
    ),
    "a GPU that the extension was not built for": (
        versions(archs=("80-real", "90-real"), devices=(H100, RTX_5090)), True,
        "the extension was built for 80-real, 90-real, but the GPU is sm_120: build it again by "
        "`CMAKE_ARGS=-DALIGN_CUDA_ARCHS=120 pip install .`, with an nvcc that knows it",
    ),
    "machine code of a newer GPU of the same major version": (
        versions(archs=("89-real",), devices=((8, 6),)), True, "but the GPU is sm_86",
    ),
    "a GPU older than the kernels": (
        versions(devices=(P100,)), True, "the kernels need a GPU of sm_75 or newer, this one is sm_60",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSOUND)
def test_what_does_not_go_together_has_one_line_with_the_cure(name):
    found, broken, sentence = UNSOUND[name]
    advice = found.advice()
    assert advice is not None
    assert sentence in advice.text
    assert "\n" not in advice.text
    assert advice.broken == broken


@pytest.mark.parametrize("name", UNSOUND)
def test_the_doctor_prints_it_and_is_unhealthy_if_something_is_broken(name, monkeypatch):
    found, broken, sentence = UNSOUND[name]
    monkeypatch.setattr(doctor, "installed_versions", lambda: found)
    monkeypatch.setattr(doctor, "OPS", {})  # other tests run the operators
    monkeypatch.setattr(doctor, "ARCHITECTURES", {})
    out = io.StringIO()
    assert doctor.run(Console(file=out, width=400)) == (not broken)
    assert sentence in out.getvalue()
    assert str(found) in out.getvalue()


def test_the_versions_are_shown_on_one_line():
    assert str(versions(driver=(12, 8), torch=None)) == "driver=12.8  torch=none  extension=13.0"


@pytest.mark.parametrize(("text", "version"), [("13.0", (13, 0)), ("12.8.1", (12, 8)), ("", None), (None, None)])
def test_versions_are_read(text, version):
    assert parse(text) == version


@pytest.mark.parametrize(
    ("code", "version"),
    [
        ("int cuDriverGetVersion(int* v) { *v = 12040; return 0; }", (12, 4)),
        ("int cuDriverGetVersion(int* v) { *v = 13020; return 0; }", (13, 2)),
        ("int cuDriverGetVersion(int* v) { *v = 13020; return 100; }", None),
        ("int another(void) { return 0; }", None),
    ],
)
def test_the_driver_is_asked_through_its_library(code, version, tmp_path):
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text(code)
    subprocess.run(["gcc", "-shared", "-fPIC", source, "-o", library], check=True)
    assert driver_version(str(library)) == version


def test_without_the_library_there_is_no_driver():
    assert driver_version("libcuda_of_nobody.so.1") is None


def test_the_versions_of_this_process_are_those_of_its_parts():
    import torch

    from align_ext.ops._native import build_info

    found = installed_versions()
    assert found.torch == parse(torch.version.cuda)
    assert (found.toolkit is None) == (build_info.cuda_archs == "")
    assert found.architectures == tuple(build_info.cuda_archs.split())
