"""What was measured on a machine, as a file: its name, its processor, the versions, and every ratio.

The file is JSON: `tables` holds table -> column -> variant -> its median in ms, the number of its turns, the quartiles
of its ratio to the first variant ("ratio") and to its restructured form ("to_restructured"), tokens per second and peak
memory, each where it is known.
"""

import datetime
import json
import os
import platform
import re
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from align_ext.bench.setting import Case
from align_ext.bench.timing import Comparison

MARK = '"what": "measurements of align-lora bench"'  # identifies the files, which may be overwritten
PACKAGES = ("align_ext", "torch", "transformers", "peft", "bitsandbytes")
MEASUREMENTS = Path("docs/measurements")  # of a checkout
# oneDNN's names of what ONEDNN_MAX_CPU_ISA allows, each with what stands before it.
_ISAS = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI", "AVX512_CORE_BF16",
    "AVX512_CORE_FP16", "AVX10_1_512", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16", "AVX10_1_512_AMX",
    "AVX10_1_512_AMX_FP16",
)  # fmt: skip
_EXTENSIONS = {  # by width: the flag of /proc/cpuinfo, oneDNN's name
    "AVX2": ("avx2", "AVX2"),
    "AVX-512": ("avx512vl", "AVX512_CORE"),
    "AVX512_BF16": ("avx512_bf16", "AVX512_CORE_BF16"),
    "AMX": ("amx_bf16", "AVX512_CORE_AMX"),
}  # fmt: skip
Tables = dict[str, dict[str, dict[str, dict[str, Any]]]]


def _cpuinfo() -> dict[str, str]:
    """Returns the first processor's entries of /proc/cpuinfo; none where there is no such file."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def processor(cpuinfo: Mapping[str, str]) -> str:
    """Returns the processor's name without marks and clock, and its family and model: clouds leave out of names."""
    name = cpuinfo.get("model name") or platform.processor() or platform.machine()
    name = re.sub(r"\((R|TM)\)|\bCPU\b|@.*|Processor", " ", name, flags=re.IGNORECASE)
    numbers = (f"{key} {cpuinfo[of]}" for key, of in (("family", "cpu family"), ("model", "model")) if of in cpuinfo)
    return " ".join([*name.split(), *numbers])


def vectors(cpuinfo: Mapping[str, str], limit: str | None) -> list[str]:
    """Returns the vector extensions, narrowest first, that the processor has and ONEDNN_MAX_CPU_ISA allows."""
    flags, limit = cpuinfo.get("flags", "").split(), (limit or "").upper()
    allowed = _ISAS[: _ISAS.index(limit) + 1] if limit in _ISAS else _ISAS
    found = [name for name, (flag, isa) in _EXTENSIONS.items() if flag in flags and isa in allowed]
    return found or [torch.backends.cpu.get_cpu_capability()]


def machine(device: str) -> dict[str, Any]:
    """Returns what times depend on: the processor with its vectors and threads, or the GPU."""
    if device == "cuda":
        return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    cpuinfo, limit = _cpuinfo(), os.environ.get("ONEDNN_MAX_CPU_ISA")
    about = {
        "processor": processor(cpuinfo), "vectors": vectors(cpuinfo, limit), "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }  # fmt: skip
    return about | ({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})


def file_in(folder: Path | None, device: str) -> Path:
    """Returns this machine's file in a folder; None: docs/measurements of a checkout, else the current folder."""
    about = machine(device)
    words = about.get("gpu") or f"{about['processor']} {about['vectors'][-1]} {about['threads']} threads"
    name = re.sub(r"[^a-z0-9]+", "-", words.lower()).strip("-") + ".json"
    return (folder or (MEASUREMENTS if MEASUREMENTS.is_dir() else Path())) / name


def tables(cases: Sequence[Case], results: Mapping[str, Comparison]) -> Tables:
    """Returns the figures of all comparisons by table, column and variant."""
    found: Tables = {}
    for case in cases:
        if case.title not in results:  # a slow machine leaves some out
            continue
        comparison = results[case.title]
        column = found.setdefault(case.table, {})[case.column] = {}
        for name, times in comparison.times_ms.items():
            median = statistics.median(times)
            figures: dict[str, Any] = {"ms": _short(median), "turns": len(times)}
            if name in comparison.baselines:
                figures["ratio"] = [_short(value) for value in comparison.ratios(name)]
            if name in comparison.restructured:
                figures["to_restructured"] = [_short(value) for value in comparison.to_restructured(name)]
            if comparison.tokens:
                figures["tokens_per_s"] = round(1e3 * comparison.tokens / median)
            if name in comparison.peak_mib:
                figures["peak_mib"] = round(comparison.peak_mib[name])
            column[name] = figures
    return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _packages() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def content(
    device: str, suites: Mapping[str, Sequence[Case]], found: Tables, seconds: float, before: str | None = None
) -> str:
    """Returns the file of a run.

    Args:
        device: where it ran.
        suites: its suites and their comparisons.
        found: their tables.
        seconds: how long it took.
        before: the machine's file so far, whose other suites stay, unless they are of another machine or of other
            versions: those would not compare.
    """
    about = {"what": "measurements of align-lora bench", "machine": machine(device), "packages": _packages()}
    old = json.loads(before) if before else {}
    alike = all(old.get(key) == value for key, value in about.items())
    others = {name: suite for name, suite in old.get("suites", {}).items() if alike and name not in suites}
    about["date"] = datetime.date.today().isoformat()
    about["suites"] = others | {
        name: {
            "seconds": round(seconds / len(suites)),
            "tables": [t for t in found if t in {case.table for case in cases}],
        }
        for name, cases in suites.items()
    }
    about["tables"] = {table: old["tables"][table] for suite in others.values() for table in suite["tables"]} | found
    text = json.dumps(about, indent=1, ensure_ascii=False)
    for innermost in (r"\[\n[^\[\]{}]*\]", r"\{\n[^{}]*\}"):  # a line for each variant
        text = re.sub(innermost, lambda found: re.sub(r"\s*\n\s*", " ", found[0]), text)
    return re.sub(r"([\[{]) | ([\]}])", r"\1\2", text) + "\n"
