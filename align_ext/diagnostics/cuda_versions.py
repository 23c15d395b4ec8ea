"""Whether the CUDA of the driver, of torch and of the extension go together; where they do not, what to do.

A driver runs programs of its own CUDA, of older ones, and of newer ones of the same major version as far as these need
no compilation of PTX (CUDA Compatibility, "Minor Version Compatibility").
"""

import ctypes
import re
from dataclasses import dataclass
from typing import NamedTuple

import torch

from align_ext.ops._native import build_info

Version = tuple[int, int]
OLDEST = 75  # the oldest architecture that the kernels can be built for


class Advice(NamedTuple):
    """A sentence with what is the matter and the cure; broken: a GPU computes nothing, or may compute wrongly."""

    text: str
    broken: bool


@dataclass(frozen=True)
class CudaVersions:
    """The versions of CUDA that meet in a process.

    Attributes:
        driver: the newest CUDA that the driver runs; None: there is no driver.
        torch: the CUDA that torch was built with; None: a CPU build.
        toolkit: the CUDA that the extension was built with; None: it was built without CUDA kernels.
        architectures: what the extension holds, as CMake writes it: "80-real" machine code, "120-virtual" PTX, "120"
            both.
        devices: the compute capability of each GPU that torch sees.
    """

    driver: Version | None
    torch: Version | None
    toolkit: Version | None
    architectures: tuple[str, ...] = ()
    devices: tuple[Version, ...] = ()

    def __str__(self) -> str:
        names = {"driver": self.driver, "torch": self.torch, "extension": self.toolkit}
        return "  ".join(f"{name}={_text(version) if version else 'none'}" for name, version in names.items())

    def advice(self) -> Advice | None:
        """Returns what to do first, or None if all go together or there is nothing to use a GPU with."""
        if self.driver is None:
            return self._without_driver()
        driver = f"the driver runs CUDA up to {_text(self.driver)}"
        if self.torch is None:
            text = f"this torch is a CPU build, but {driver}: install a torch for CUDA {_text(self.driver)} or older"
            return Advice(f"{text}, then this package again", broken=False)
        if self.driver[0] < self.torch[0]:
            text = f"{driver}, but torch needs {_text(self.torch)}: update the driver"
            return Advice(f"{text}, or install a torch for CUDA {_text(self.driver)} or older", broken=True)
        if self.toolkit is None:
            text = "the extension was built without CUDA kernels: put nvcc of CUDA"
            return Advice(f"{text} {_text(self.driver)} or older on PATH and run `pip install .` again", broken=False)
        for device in self.devices:
            found = self._code_for(device)
            if found is None:
                return _not_built_for(device, self.architectures)
            if self.driver[0] < self.toolkit[0] or (found == "PTX" and self.driver < self.toolkit):
                text = f"{driver}, but the extension was built by nvcc {_text(self.toolkit)}: update the driver"
                return Advice(f"{text}, or run `pip install .` again with an nvcc that is no newer", broken=True)
        return None

    def _without_driver(self) -> Advice | None:
        needed = max(filter(None, (self.torch, self.toolkit)), default=None)
        if self.torch is None or needed is None:
            return None
        text = "no NVIDIA driver was found, so that all runs on the CPU; for a GPU, install a driver"
        return Advice(f"{text} that runs CUDA {_text(needed)} or newer", broken=False)

    def _code_for(self, device: Version) -> str | None:
        """What of the extension a device runs: machine code of its major version, else the PTX of an older one."""
        found = None
        for architecture in self.architectures:
            match = re.fullmatch(r"(\d+)(\d)(-real|-virtual)?", architecture)
            if match is None:  # "native", "90a": CMake knows what these are
                return "machine code"
            built, kind = (int(match[1]), int(match[2])), match[3]
            if kind != "-virtual" and built[0] == device[0] and built <= device:
                return "machine code"
            if kind != "-real" and built <= device:
                found = "PTX"
        return found


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


def _not_built_for(device: Version, architectures: tuple[str, ...]) -> Advice:
    number = 10 * device[0] + device[1]
    if number < OLDEST:
        return Advice(f"the kernels need a GPU of sm_{OLDEST} or newer, this one is sm_{number}", broken=True)
    text = f"the extension was built for {', '.join(architectures)}, but the GPU is sm_{number}: build it again by"
    return Advice(f"{text} `CMAKE_ARGS=-DALIGN_CUDA_ARCHS={number} pip install .`, with an nvcc that knows it", True)


def parse(version: str | None) -> Version | None:
    """Returns the first two numbers of a version, or None if there is none."""
    match = re.match(r"(\d+)\.(\d+)", version or "")
    return (int(match[1]), int(match[2])) if match else None


def driver_version(library: str = "libcuda.so.1") -> Version | None:
    """Asks the driver's library for the newest CUDA that it runs; None if there is no driver."""
    number = ctypes.c_int()
    try:
        if ctypes.CDLL(library).cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):  # no such library, or another one
        return None
    return number.value // 1000, number.value % 1000 // 10


def installed_versions() -> CudaVersions:
    """Returns the versions of this process."""
    devices = tuple(torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
    architectures = tuple(build_info.cuda_archs.split())
    return CudaVersions(
        driver_version(), parse(torch.version.cuda), parse(build_info.cuda_toolkit), architectures, devices
    )
