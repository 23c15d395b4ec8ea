"""What the compiler made of each CUDA kernel, without a GPU: registers, spills, blocks per multiprocessor, code.

Usage: python benchmarks/cuda_static.py [--archs 80,90] [--write docs/cuda.md]

Prints a table kernel x architecture, or rewrites the one between the markers of a file. Needs nvcc and nvdisasm (a
dependency of align_ext[test]).
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import sass
from page import show

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["-std=c++20", "-O3", "-DNDEBUG"]  # CMake's, for a release build
BEGIN, END = "<!-- cuda_static: begin -->", "<!-- cuda_static: end -->"


class Multiprocessor(NamedTuple):
    """What its blocks share (CUDA Programming Guide, "Features and Technical Specifications")."""

    warps: int
    blocks: int
    shared: int  # bytes
    reserved: int  # bytes of it that each block takes for the system


MULTIPROCESSORS = {
    75: Multiprocessor(32, 16, 64 << 10, 0),
    80: Multiprocessor(64, 32, 164 << 10, 1 << 10),
    86: Multiprocessor(48, 16, 100 << 10, 1 << 10),
    89: Multiprocessor(48, 24, 100 << 10, 1 << 10),
    90: Multiprocessor(64, 32, 228 << 10, 1 << 10),
    100: Multiprocessor(64, 32, 228 << 10, 1 << 10),
    120: Multiprocessor(48, 24, 100 << 10, 1 << 10),
}
QUARTER_REGISTERS = 16384  # a multiprocessor has four register files, and a warp lives in one of them
REGISTER_UNIT = 256  # that a warp's registers are rounded up to

# C++ expressions for the bytes of dynamic shared memory that a kernel is launched with; Math: its first argument.
DYNAMIC_SHARED = {
    "shrink_kernel": "kShrinkShared<Math>",
    "sweep_kernel": "kOuterShared<Math, true>",
    "expand_kernel": "kExpandShared<Math>",
    "backward_kernel": "kBackwardShared<Math>",
}
SHARED_HEADERS = ["cuda/shrink.cuh", "cuda/backward.cuh", "cuda/mma.cuh", "cuda/ffma.cuh"]
MATH = re.compile(r"(\w+)<((?:Mma|Ffma)<[^<>]*>)")  # shrink_kernel<Mma<bfloat16, 16>>


@dataclass
class Kernel:
    """One kernel as compiled for one architecture."""

    source: str  # the file's stem
    name: str  # shrink_kernel<Mma<bfloat16, 16>>
    arch: int
    registers: int
    spills: int  # bytes stored and loaded
    stack: int  # bytes
    shared: int  # bytes; compile_all adds the dynamic ones
    threads: int  # of a block, at most
    code: list[sass.Instruction] = field(repr=False)

    @cached_property
    def flow(self) -> sass.Flow:
        """The graph of its branches."""
        return sass.Flow(self.code)

    @property
    def empty(self) -> bool:
        """Whether it does nothing: another kernel takes its place on this architecture."""
        return not any(instruction.base in {"STG", "ST", "RED", "REDG"} for instruction in self.code)

    @property
    def blocks_by_shared(self) -> int:
        """Blocks whose shared memory one multiprocessor has; with 0 a launch fails."""
        limits = MULTIPROCESSORS[self.arch]
        return limits.shared // max(self.shared + limits.reserved, 1)

    @property
    def blocks(self) -> int:
        """Blocks that one multiprocessor holds at a time."""
        limits = MULTIPROCESSORS[self.arch]
        warps = -(-self.threads // 32)
        registers = -(-self.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        by_registers = 4 * (QUARTER_REGISTERS // registers) // warps
        return min(limits.warps // warps, limits.blocks, by_registers, self.blocks_by_shared)


def find_tool(name: str) -> str | None:
    """Path of a CUDA tool: where CMake looks, then in NVIDIA's wheels."""
    homes = [os.environ.get(variable) for variable in ("CUDA_HOME", "CUDA_PATH")]
    folders = [Path(home) / "bin" for home in (*homes, "/usr/local/cuda") if home]
    folders += [Path(entry) / "nvidia/cu13/bin" for entry in sys.path]
    return shutil.which(name) or next((str(f / name) for f in folders if (f / name).is_file()), None)


def run(*command: str | Path) -> str:
    """Output and diagnostics of a command that must succeed."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def tool(name: str) -> str:
    """Path of a CUDA tool that must be there."""
    if path := find_tool(name):
        return path
    raise RuntimeError(f'{name} was not found: install the CUDA toolkit, or pip install "align_ext[test]" for nvdisasm')


def nvcc_version() -> str:
    """For example "13.0"."""
    match = re.search(r"release (\d+\.\d+)", run(tool("nvcc"), "--version"))
    assert match
    return match[1]


def readable(mangled: Iterable[str]) -> dict[str, str]:
    """Names without namespaces, return types and parameters."""
    names = list(mangled)
    plain = re.sub(r"\(anonymous namespace\)::|\b(?:align|cuda)::", "", run("c++filt", *names)).splitlines()
    plain = [re.sub(r"^void |\(.*", "", line).replace("> >", ">>") for line in plain]
    return dict(zip(names, plain, strict=True))


def parse(source: str, arch: int, log: str, listing: str) -> list[Kernel]:
    """Kernels from what ptxas -v and nvdisasm say of one file."""
    sections = {part.split()[0]: part for part in re.split(r"^//-{9,} ", listing, flags=re.M)[1:]}
    reports = {part.split("'")[0]: part for part in log.split("Compiling entry function '")[1:]}
    kernels = []
    for mangled, name in readable(reports).items():

        def total(pattern: str, report: str = reports[mangled]) -> int:
            return sum(map(int, re.findall(pattern, report)))

        threads = re.search(r"EIATTR_MAX_THREADS.*?\.word\s+(0x\w+)", sections[".nv.info." + mangled], re.S)
        kernels.append(
            Kernel(
                source,
                name,
                arch,
                registers=total(r"Used (\d+) registers"),
                spills=total(r"(\d+) bytes spill"),
                stack=total(r"(\d+) bytes stack frame"),
                shared=total(r"(\d+) bytes smem"),
                threads=int(threads[1], 16) if threads else 1024,
                code=sass.parse(sections[".text." + mangled]),
            )
        )
    return sorted(kernels, key=lambda kernel: kernel.name)


def compile_file(source: Path, arch: int, include: Path = ROOT / "csrc") -> list[Kernel]:
    """The kernels of one file for one architecture."""
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "out.cubin"
        log = run(nvcc, "-cubin", f"-arch=sm_{arch}", *FLAGS, "-I", include, "-Xptxas", "-v", source, "-o", cubin)
        return parse(source.stem, arch, log, run(nvdisasm, "-hex", cubin))


def dynamic_shared(names: Iterable[str]) -> dict[str, int]:
    """Bytes of dynamic shared memory by kernel, which nvcc computes from the constants in the headers."""
    maths = {name: match.groups() for name in names if (match := MATH.match(name)) and match[1] in DYNAMIC_SHARED}
    if not maths:
        return {}
    lines = [f'#include "{header}"' for header in SHARED_HEADERS] + ["namespace align::cuda {"]
    for i, (kernel, math) in enumerate(maths.values()):
        expression = DYNAMIC_SHARED[kernel].replace("Math", math)
        lines.append(f'extern "C" __device__ unsigned long long bytes_{i} = {expression};')
    with tempfile.TemporaryDirectory() as folder:
        source, ptx = Path(folder) / "shared.cu", Path(folder) / "shared.ptx"
        source.write_text("\n".join([*lines, "}\n"]))
        run(tool("nvcc"), "-ptx", "-arch=sm_80", *FLAGS, "-I", ROOT / "csrc", source, "-o", ptx)
        values = dict(re.findall(r"\.u64 bytes_(\d+)(?: = (\d+))?;", ptx.read_text()))
    return {name: int(values[str(i)] or 0) for i, name in enumerate(maths)}


def compile_all(archs: Iterable[int]) -> list[Kernel]:
    """Every kernel of csrc/cuda for every architecture."""
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda path: -path.stat().st_size)  # the longest first
    jobs = [(source, arch) for source in sources for arch in archs]
    with ThreadPoolExecutor(2) as pool:
        kernels = [kernel for found in pool.map(lambda job: compile_file(*job), jobs) for kernel in found]
    shared = dynamic_shared({kernel.name for kernel in kernels})
    for kernel in kernels:
        kernel.shared += shared.get(kernel.name, 0)
    return kernels


Cells = dict[tuple[str, str], dict[str, str]]  # by (source, kernel) and architecture


def cells(kernels: Iterable[Kernel]) -> Cells:
    """Of each kernel: registers · blocks of a multiprocessor; bfloat16's and float16's kernels share a row."""
    groups: dict[tuple[str, str], dict[str, list[Kernel]]] = {}
    for kernel in kernels:
        row = kernel.source, re.sub(r"\bb?float16\b", "T", kernel.name)
        groups.setdefault(row, {}).setdefault(f"sm_{kernel.arch}", []).append(kernel)

    def text(alike: list[Kernel]) -> str:
        def joined(values: Iterable[int]) -> str:
            return " / ".join(map(str, dict.fromkeys(values)))

        if all(kernel.empty for kernel in alike):
            return "-"
        spilled = any(kernel.spills for kernel in alike)
        spills = f", {joined(kernel.spills for kernel in alike)} B spilled" if spilled else ""
        return f"{joined(k.registers for k in alike)} · {joined(k.blocks for k in alike)}{spills}"

    return {row: {arch: text(alike) for arch, alike in columns.items()} for row, columns in groups.items()}


def table(rows: Cells) -> str:
    """A Markdown table for each source file, a row a kernel, a column an architecture."""
    archs = list(dict.fromkeys(arch for columns in rows.values() for arch in columns))
    lines = [
        f"nvcc {nvcc_version()}: registers of a thread · blocks that share a multiprocessor. T: bfloat16 / float16;",
        "-: never launched there, and empty.",
    ]
    for source in dict.fromkeys(source for source, _ in rows):
        lines += ["", "| " + " | ".join([source, *archs]) + " |", "|---" * (len(archs) + 1) + "|"]
        for (of, kernel), columns in rows.items():
            if of == source:
                lines.append("| " + " | ".join([f"`{kernel}`", *(columns.get(arch, "") for arch in archs)]) + " |")
    return "\n".join(lines)


def read_table(text: str) -> tuple[str, Cells]:
    """The nvcc version and the cells of what main wrote between the markers."""
    section = text.split(BEGIN)[1].split(END)[0]
    rows: Cells = {}
    source, archs = "", [""]
    for line in section.splitlines():
        first, *rest = [part.strip() for part in line.strip("|").split("|")]
        if rest and first.startswith("`"):
            rows[source, first.strip("`")] = {arch: cell for arch, cell in zip(archs, rest, strict=True) if cell}
        elif rest and not first.startswith("-"):
            source, archs = first, rest
    return section.split(":")[0].split()[-1], rows


def main() -> None:
    """Prints the table, or writes it between the markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default=",".join(map(str, MULTIPROCESSORS)))
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    kernels = compile_all(list(map(int, options.archs.split(","))))
    show(table(cells(kernels)), (BEGIN, END), options.write)


if __name__ == "__main__":
    main()
