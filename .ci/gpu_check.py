"""What only a GPU can tell, as one table: every line of gpu_lines.py, each in a process of its own.

Builds the extension in place with its CUDA kernels, then runs the lines one after the other, whatever becomes of
them, and writes benchmarks/results/gpu-<device>.md after each. A line that cannot run here says why. A WORD limits the
run to lines in whose group and name it is. Where there is neither cmake, ninja and pybind11 nor a package index, an
extension that was built elsewhere is taken as it is: a wheel for this Python, unzipped here, brings it.

    [PYTHON=...] python .ci/gpu_check.py [--seconds N] [--write FILE] [WORD...]
    ALIGN_SIMT_EXTENSION=FILE python .ci/gpu_check.py --dry-run [WORD...]

A dry run needs no GPU: the CUDA kernels run on the SIMT engine (an extension built with ALIGN_SIMT) and few cases of
each line; stand-ins take the place of compute-sanitizer, Nsight Compute and Unsloth. It writes nothing unless told to,
and says nothing about GPUs.

Exits with 1 if a line failed, with 2 if nothing could be checked, else with 0.
"""

import argparse
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from gpu_lines import LINES, ROOT, Line

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
CANNOT = 77  # the exit status of a script that cannot run here; its last line says why
BUILD = Line("installation", "build", "the extension builds, in place, with CUDA kernels", seconds=3600)
ADDOPTS = "addopts=-ra --strict-markers --import-mode=importlib"  # pyproject's, without what needs pytest-xdist
MODULES = sorted({need for line in LINES for need in line.needs if need.isidentifier() and need != "ncu"})
BUILDERS, PROGRAMS = ("setuptools", "pybind11"), ("cmake", "ninja")
AS_IT_IS = """
from align_ext.ops._native import build_info
print("figure: built elsewhere for", build_info.cuda_archs)
raise SystemExit(not build_info.cuda_archs)
"""
PROBE = """
import glob, importlib.util, json, sys, sysconfig, torch
found = {"torch": torch.__version__, "CUDA": torch.version.cuda, "gpus": torch.cuda.device_count()}
found["modules"] = [name for name in sys.argv[1:] if importlib.util.find_spec(name)]
found["purelib"] = sysconfig.get_path("purelib")
found["extension"] = bool(glob.glob("align_ext/_C.*.so"))
if found["gpus"]:
    found["GPU"] = torch.cuda.get_device_name(0)
    found["arch"] = "sm_%d%d" % torch.cuda.get_device_capability(0)
    found["GiB"] = torch.cuda.mem_get_info(0)[0] / 2**30
print(json.dumps(found))
"""
SANITIZER_STAND_IN = """
import subprocess, sys
status = subprocess.call(sys.argv[sys.argv.index("--") + 1:])
print("========= ERROR SUMMARY: 0 errors (a stand-in: nothing was looked at)")
sys.exit(status)
"""


class Result(NamedTuple):
    """What became of a line."""

    verdict: str
    why: str = ""
    seconds: float = 0.0
    figure: str = ""
    output: str = ""


class Machine(NamedTuple):
    """What the lines run on."""

    python: str
    facts: dict[str, Any]
    dry: bool

    def tool(self, name: str) -> str | None:
        """A program of the toolkit: on PATH, beside nvcc, or in NVIDIA's wheels."""
        homes = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
        if nvcc := shutil.which("nvcc"):
            homes.append(Path(nvcc).resolve().parent)
        homes.append(Path(self.facts["purelib"]) / "nvidia/cu13/bin")
        return shutil.which(name) or next((str(home / name) for home in homes if (home / name).is_file()), None)

    def lacks(self, line: Line) -> str:
        """What a line needs that is not here."""
        facts, lacks = self.facts, []
        for need in line.needs:
            number, _, unit = need.partition(" ")
            if unit == "GPUs":
                if facts["gpus"] < int(number):
                    lacks.append(f"{need}: found {facts['gpus']}")
            elif unit == "GiB":
                if facts["GiB"] < int(number):
                    lacks.append(f"{need} of memory: {facts['GiB']:.0f} are free")
            elif need == "ncu":
                lacks += [] if self.dry or self.tool(need) else ["Nsight Compute (ncu)"]
            elif need not in facts["modules"]:
                lacks.append(need)
        if line.sanitizer and not self.dry and self.tool("compute-sanitizer") is None:
            lacks.append("compute-sanitizer (CUDA toolkit, or pip install nvidia-cuda-sanitizer-api)")
        return ", ".join(lacks)

    def command(self, line: Line) -> list[str]:
        """A line's command."""
        if line is BUILD:
            return self.build_command()
        arguments = [*line.arguments, *(line.dry if self.dry else line.on_gpu)]
        arguments = [self.tool("ncu") or "" if argument == "NCU" else argument for argument in arguments]
        if line.code:
            return [self.python, "-c", ("import simt_extension; " if self.dry else "") + line.code, *arguments]
        command = [self.python, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-o", ADDOPTS]
        if line.group == "operators" and "xdist" in self.facts["modules"] and not self.dry:
            command += ["-n", "4"]
        command += ["-p", "simt_extension", "--device", "simt"] if self.dry else ["--device", "cuda"]
        if line.sanitizer and self.dry:
            return [self.python, "-c", SANITIZER_STAND_IN, *line.sanitizer, "--", *command, *arguments]
        if line.sanitizer:
            command = [self.tool("compute-sanitizer") or "", "--error-exitcode", "1", *line.sanitizer, *command]
        return [*command, *arguments]

    def build_command(self) -> list[str]:
        """Builds with the tools that are here; without them takes an extension as it is, or pip fetches them."""
        if self.dry:
            return [self.python, "-c", "import simt_extension; simt_extension.extension.launches()"]
        path = self.environment(BUILD)["PATH"]
        here = {*BUILDERS} <= {*self.facts["modules"]} and all(shutil.which(name, path=path) for name in PROGRAMS)
        if not here and self.facts["extension"]:
            return [self.python, "-c", AS_IT_IS]
        isolation = ["--no-build-isolation"] if here else []
        return [self.python, "-m", "pip", "install", "--no-deps", *isolation, "-e", str(ROOT)]

    def environment(self, line: Line) -> dict[str, str]:
        """A line's environment; under a sanitizer each tensor has bounds of its own, without torch's cache."""
        folders = [".", "python_tests", "benchmarks", *(["python_tests/gpu/stand_ins"] if self.dry else [])]
        path = [str(ROOT / folder) for folder in folders]
        programs = os.pathsep.join([str(Path(self.python).parent), os.environ.get("PATH", os.defpath)])
        more = {
            "PATH": programs,
            "PYTHONPATH": os.pathsep.join(path),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        more |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONUNBUFFERED": "1"}
        more |= {"ALIGN_CUDA": "ON"} if line is BUILD else {}
        if "2 GPUs" not in line.needs:  # transformers' Trainer would take all of them
            more["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
        more |= {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} if line.sanitizer else {}
        return os.environ | more


def find_machine(dry: bool) -> Machine | None:
    """The machine, or None if there is no GPU and this is no dry run."""
    python = shutil.which(os.environ.get("PYTHON", sys.executable))
    if python is None:
        return None
    probe = [python, "-c", PROBE, *MODULES, *BUILDERS, "xdist"]
    found = subprocess.run(probe, capture_output=True, text=True, check=False, cwd=ROOT)
    try:
        facts = json.loads(found.stdout.splitlines()[-1])
    except (IndexError, ValueError):  # no torch, or not one that works
        return None
    if not dry and not facts["gpus"]:
        return None
    if dry:
        facts["modules"].append("unsloth")  # python_tests/gpu/stand_ins has a stand-in
        facts |= {"GPU": "DRY RUN: nothing ran on a GPU", "arch": "SIMT engine", "gpus": 2, "GiB": 1e3}
    return Machine(python, facts, dry)


def run(line: Line, machine: Machine, limit: float) -> Result:
    """Runs a line that nothing lacks, with what it started, for so many seconds at most."""
    start, late = time.monotonic(), False
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            machine.command(line), cwd=ROOT, env=machine.environment(line), stdout=log, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = True
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.seek(0)
        output = log.read()
    verdict, why = judge(line, process.returncode, output)
    if late:
        verdict, why = (
            (NOT_RUN, "the time was up") if limit < line.seconds else (FAILED, f"not done after {limit:.0f} s")
        )
    figures = [*re.findall(r"^=* ?(\d+ (?:passed|failed|skipped|error).*?) in [0-9.]+s", output, re.M)[-1:]]
    figures += re.findall(r"figure: (.*)", output)
    return Result(verdict, why, time.monotonic() - start, "; ".join(figures), output)


def judge(line: Line, status: int, output: str) -> tuple[str, str]:
    """A verdict, and why it is not that the line passed."""
    if line is BUILD and status and "No matching distribution" in output:
        return NOT_RUN, "it needs setuptools, pybind11, cmake and ninja, and there is no package index"
    if line.sanitizer and "Device not supported" in output:
        return NOT_RUN, "compute-sanitizer does not support this device"
    if status == CANNOT:
        return NOT_RUN, output.splitlines()[-1]
    if status:
        return FAILED, f"exit status {status}"
    if line.sanitizer:
        summaries = re.findall(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)", output, re.M)
        if not summaries or any(int(count) for count in summaries):
            return FAILED, "findings" if summaries else "the tool made no summary"
    if not line.code and line is not BUILD and not re.search(r"\b[1-9]\d* passed", output):
        reasons = dict.fromkeys(re.findall(r"^SKIPPED \[\d+\] \S+: (.*)", output, re.M))
        return (NOT_RUN, "; ".join(reasons)) if reasons else (FAILED, "no test ran")
    return PASSED, ""


class Table:
    """The results so far, as Markdown."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.results = machine, dict.fromkeys([BUILD, *LINES], Result(NOT_RUN, "not reached"))

    def count(self, verdict: str) -> int:
        """How many lines have a verdict."""
        return sum(result.verdict == verdict for result in self.results.values())

    @property
    def totals(self) -> str:
        """In words."""
        return ", ".join(f"{self.count(verdict)} {verdict}" for verdict in (PASSED, FAILED, NOT_RUN))

    def about(self) -> str:
        """Whose figures these are: the head of each table."""
        facts = self.machine.facts
        driver = _says("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        commit = _says("git", "describe", "--always", "--dirty", "--abbrev=12")
        nvcc = _says("nvcc", "--version", pattern=r"release ([\d.]+)")
        return (
            f"{facts['GPU']}, {facts['arch']}, driver {driver}, torch {facts['torch']}, CUDA {facts['CUDA']}, "
            f"nvcc {nvcc}, commit {commit}, {datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"
        )

    def row(self, line: Line) -> str:
        """A line of the table."""
        result = self.results[line]
        verdict = f"{result.verdict}: {result.why}" if result.why else result.verdict
        verdict = f"dry run: {verdict}" if self.machine.dry and result.verdict == PASSED else verdict
        cells = (line.group, line.name, line.checked, verdict, f"{result.seconds:.0f}", result.figure)
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    def markdown(self) -> str:
        """Everything."""
        about = self.about()
        parts = [f"# {self.machine.facts['GPU']}", f"Written by `make gpu-check`: {self.totals}."]
        head = ["| | line | checked | verdict | s | figure |", "|---|---|---|---|---|---|"]
        parts += [f"## Lines\n\n{about}", "\n".join([*head, *map(self.row, self.results)])]
        for line, result in self.results.items():
            if result.verdict == FAILED:
                end = "\n".join(result.output.splitlines()[-30:])
                parts += [f"## {line.name}: how it failed\n\n{about}", f"```\n{end}\n```"]
            elif line.table and result.output:
                parts += [f"## {line.name}\n\n{about}", f"```\n{result.output.strip()}\n```"]
        return "\n\n".join(parts) + "\n"


@functools.cache
def _says(*command: str, pattern: str = r"(.+)") -> str:
    """What a program prints, the first match."""
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT).stdout
    except OSError:
        found = ""
    match = re.search(pattern, found)
    return match[1] if match else "unknown"


def check(table: Table, words: list[str], seconds: float, file: Path | None) -> None:
    """Runs all lines in turn; the table is written after each."""
    machine, end = table.machine, time.monotonic() + seconds
    for line in table.results:
        left = end - time.monotonic()
        wanted = not words or line is BUILD or any(word in f"{line.group} {line.name}" for word in words)
        lacks = machine.lacks(line)
        built = line is BUILD or table.results[BUILD].verdict == PASSED
        if not wanted:
            result = Result(NOT_RUN, "not asked for")
        elif not built:
            result = Result(NOT_RUN, "the extension was not built")
        elif lacks:
            result = Result(NOT_RUN, f"needs {lacks}")
        elif left < 0:
            result = Result(NOT_RUN, "the time was up")
        else:
            result = run(line, machine, min(line.seconds, left))
        table.results[line] = result
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(table.markdown())
        if wanted:
            print(table.row(line), flush=True)


def main() -> int:
    """Parses arguments, runs the lines; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", metavar="WORD", help="of lines that are wanted")
    parser.add_argument("--dry-run", action="store_true", help="on the SIMT engine and stand-ins")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no further line begins")
    parser.add_argument("--write", type=Path, metavar="FILE", help="other results [benchmarks/results/gpu-<device>.md]")
    options = parser.parse_args()
    if options.dry_run and not Path(os.environ.get("ALIGN_SIMT_EXTENSION", "")).is_file():
        parser.error(
            "a dry run needs ALIGN_SIMT_EXTENSION, the path of an extension built with ALIGN_SIMT (CMakeLists.txt)"
        )
    machine = find_machine(options.dry_run)
    if machine is None:
        print("gpu-check needs a CUDA device, and torch sees none here: nothing was checked.", file=sys.stderr)
        return 2
    file = options.write
    if file is None and not machine.dry:
        name = re.sub(r"[^a-z0-9]+", "-", machine.facts["GPU"].lower()).strip("-")
        file = ROOT / f"benchmarks/results/gpu-{name}.md"
    table = Table(machine)
    print(table.about())
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        check(table, options.words, options.seconds, file)
    except KeyboardInterrupt:
        print("interrupted")
    print(f"{table.totals}{f'; wrote {file}' if file else ''}")
    if machine.dry:
        print("This was a dry run: nothing ran on a GPU.")
    return 1 if table.count(FAILED) else 0 if table.count(PASSED) else 2


if __name__ == "__main__":
    sys.exit(main())
