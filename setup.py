"""Builds align_ext._C by CMake; everything about the build itself stands in CMakeLists.txt."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
# What a source distribution holds beside the package.
SOURCES = ("CMakeLists.txt", "build_support/*.py", "csrc/**/*.*", "CHANGELOG.md", "CITATION.cff")
sys.path.insert(0, str(ROOT / "build_support"))
from find_torch import MINIMUM, find_torch  # noqa: E402


class CMakeBuild(build_ext):
    """Configures and builds the CMake target _C into the place where setuptools expects the extension."""

    def get_source_files(self) -> list[str]:
        """Lists the extension's sources, which go into a source distribution."""
        return sorted(str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern))

    def build_extension(self, ext: Extension) -> None:
        """Runs cmake twice: configure, build."""
        import pybind11

        torch = find_torch()
        if torch is None:
            raise SystemExit(f"align_ext needs torch >= {MINIMUM} to build: pip install torch==2.13.0, then again")
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "ALIGN_TORCH_DIR": torch.folder,
            "ALIGN_TORCH_VERSION": torch.version,
            "ALIGN_CUDA": os.environ.get("ALIGN_CUDA", "AUTO"),
        }
        if ninja := shutil.which("ninja"):
            options["CMAKE_MAKE_PROGRAM"] = ninja
        configure = ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in options.items()]
        configure += os.environ.get("CMAKE_ARGS", "").split()
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        # A cache of another cmake or generator (an older build of this folder) is not worth reusing.
        if subprocess.call(configure) != 0:
            shutil.rmtree(build, ignore_errors=True)
            subprocess.check_call(configure)
        subprocess.check_call(["cmake", "--build", str(build), "--target", "_C", "--parallel", jobs])


setup(ext_modules=[Extension("align_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
