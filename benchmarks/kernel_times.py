"""Time and bytes of each kernel of an adapted layer's forward and backward on this GPU, beside the model's prediction.

The model is kernel_work.py's, of the GPU of gpus.py that this one is called after, or an H100.

Usage: python benchmarks/kernel_times.py              times, by torch's profiler
       python benchmarks/kernel_times.py --ncu NCU    times and bytes, by Nsight Compute
       python benchmarks/kernel_times.py --csv FILE   the same of Nsight Compute's output for one lora layer
       python benchmarks/kernel_times.py --quick      runs the layers, small, and counts what the SIMT engine launches

Exits with 1 if other kernels ran than the model has, with 77 if Nsight Compute may not count here.
"""

import argparse
import csv
import io
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from gpus import GPUS, Gpu
from kernel_work import Layer, Work
from roofline import LAYERS, OURS, SIDE_BY_SIDE, digits, markdown

from align_ext import ops

_LAYERS = [*SIDE_BY_SIDE, *((name, LAYERS[0]) for name in OURS)]
CASES = {f"{name}, {n} -> {m}": (name, n, m) for name, (n, m) in _LAYERS}
P, STEPS = 0.1, 7
OURS_ALONE = "align::cuda|5align4cuda"  # in kernels' names, mangled or not
NOT_RUN = 77
TIME, BYTES = "gpu__time_duration.sum", "dram__bytes.sum"
NCU = [
    "--csv", "--print-units", "base", "--metrics", f"{TIME},{BYTES}", "--clock-control", "none",
    "--cache-control", "none", "--kernel-name-base", "demangled", "--kernel-name", f"regex:{OURS_ALONE}",
    "--profile-from-start", "off",
]  # fmt: skip
Kernel = tuple[str, float, float | None]  # name, seconds, bytes


def step_of(layer: Layer, device: str) -> Callable[[], None]:
    """A forward and backward of a layer in bfloat16 that holds its frozen weight."""
    tokens, n, m, r, heads = layer.tokens, layer.in_dim, layer.out_dim, layer.rank, layer.heads

    def normal(*size: int, trained: bool = False) -> torch.Tensor:
        scale = size[-1] ** -0.5
        return (scale * torch.randn(size, device=device)).bfloat16().requires_grad_(trained)

    x, dy = normal(tokens, n, trained=True), normal(tokens, m)
    options = {"weight": normal(m, n), "dropout_p": P, "rng": torch.tensor([1, 2], device=device)}
    if layer.offset_rank:
        options |= {"A0": normal(layer.offset_rank, n), "B0": normal(m, layer.offset_rank)}
    A = normal(r, n, trained=True)
    if heads == 1:
        op, adapters = ops.grouped_lora, [A, normal(m, r, trained=True)]
    else:
        op, adapters = ops.dropout_sum, [A, normal(heads, m, r, trained=True)]
        options["site"] = layer.site
    if layer.router:
        op, adapters = ops.routed_lora, [*adapters, normal(heads, n, trained=True)]

    def step() -> None:
        op(x, *adapters, scaling=4.0, **options)[0].backward(dy)
        for leaf in (x, *adapters):
            leaf.grad = None

    return step


def layer_of(case: str) -> tuple[Layer, Callable[[Layer, Gpu], list[Work]]]:
    """A layer and its model."""
    name, n, m = CASES[case]
    kernels, options = OURS[name]
    return Layer(n, m, **options), kernels


def this_gpu() -> Gpu:
    """The model of this GPU, or an H100's."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((gpu for gpu in GPUS if gpu.name.removeprefix("RTX ") in name), Gpu())


def profiled(step: Callable[[], None]) -> list[Kernel]:
    """The kernels of a step in their order; medians over some steps, each with a cold second-level cache."""
    cold = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    runs = []
    for _ in range(STEPS + 1):
        cold.zero_()
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        found = [event for event in profile.events() if re.search(OURS_ALONE, event.name)]
        found.sort(key=lambda event: event.time_range.start)
        runs.append([(event.name, event.time_range.elapsed_us() / 1e6) for event in found])
    runs = runs[1:]
    names = [name for name, _ in runs[0]]
    assert all([name for name, _ in run] == names for run in runs), "other kernels in another step"
    return [(name, median(run[i][1] for run in runs), None) for i, name in enumerate(names)]


def counted(ncu: str, case: str) -> list[Kernel]:
    """The kernels of a step by Nsight Compute."""
    command = [ncu, *NCU, sys.executable, __file__, "--once", case]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    kernels = read_csv(result.stdout)
    if not kernels:
        reasons = [line for line in result.stdout.splitlines() if line.startswith("==ERROR==")]
        print(result.stdout, f"Nsight Compute counted nothing: {(reasons or ['it says no more'])[0]}", sep="\n")
        sys.exit(NOT_RUN)
    return kernels


def read_csv(text: str) -> list[Kernel]:
    """Kernels in their order, of what `ncu --csv` prints: a row a kernel and metric, below lines of other kinds."""
    begin = text.find('"ID"')
    if begin < 0:
        return []
    kernels: dict[str, tuple[str, dict[str, float]]] = {}
    for row in csv.DictReader(io.StringIO(text[begin:])):
        if row["Metric Name"] in (TIME, BYTES):
            _, metrics = kernels.setdefault(row["ID"], (row["Kernel Name"], {}))
            metrics[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return [(name, metrics[TIME] / 1e9, metrics[BYTES]) for name, metrics in kernels.values()]


def once(case: str) -> None:
    """One step that a profiler looks at, after one that it does not."""
    step = step_of(layer_of(case)[0], "cuda")
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def short(name: str) -> str:
    """A kernel's name without its namespace and arguments."""
    match = re.search(r"\w+_kernel", name)
    return match[0] if match else name


def table(works: list[Work], kernels: list[Kernel], gpu: Gpu) -> str:
    """A row a kernel; those of the model and those that ran come in one order."""
    rows = []
    for i in range(max(len(works), len(kernels))):
        row = ["", "", ""]
        if i < len(works):
            row = [works[i].name, digits(1e6 * works[i].seconds(gpu)), digits(works[i].bytes / 1e6)]
        if i < len(kernels):
            name, seconds, moved = kernels[i]
            row += [short(name), f"{1e6 * seconds:.1f}", "" if moved is None else f"{moved / 1e6:.1f}"]
        rows.append(row)
    totals = sum(w.seconds(gpu) for w in works), sum(seconds for _, seconds, _ in kernels)
    rows.append(["all", digits(1e6 * totals[0]), "", "", f"{1e6 * totals[1]:.1f}", ""])
    return markdown([f"model of an {gpu.name}", "µs", "MB", "ran", "µs", "MB"], *rows)


def compare(case: str, kernels: list[Kernel], gpu: Gpu) -> bool:
    """Prints a case; returns whether as many kernels ran as the model has."""
    layer, model = layer_of(case)
    works = model(layer, gpu)
    print(f"\n{case}, T = {layer.tokens}, bfloat16, r = {layer.rank}, p = {P}\n\n{table(works, kernels, gpu)}")
    ratio = sum(seconds for _, seconds, _ in kernels) / sum(work.seconds(gpu) for work in works)
    print(f"figure: {case}: {ratio:.2f} of the model's time")
    return len(works) == len(kernels)


def quick() -> bool:
    """Small layers on the SIMT engine: whether it launches as many kernels as the model has."""
    import simt_extension

    right = True
    for case in CASES:
        layer, model = layer_of(case)
        layer = replace(layer, tokens=600, in_dim=264, out_dim=520)
        step, before = step_of(layer, "cpu"), simt_extension.launches()
        step()
        ran, modelled = simt_extension.launches() - before, len(model(layer, Gpu()))
        print(f"{case}, small: {ran} kernels ran, the model has {modelled}")
        right = right and ran == modelled
    return right


def main() -> None:
    """Parses arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ncu", metavar="NCU", help="the program")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("--once", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    gpu = this_gpu()
    if options.once:
        once(options.once)
        return
    if options.quick:
        right = [quick()]
    elif options.csv:
        text = options.csv.read_text()
        print(f"{options.csv}: {text.splitlines()[0]}")
        right = [compare(next(iter(CASES)), read_csv(text), gpu)]
    elif options.ncu:
        right = [compare(case, counted(options.ncu, case), gpu) for case in CASES]
    else:
        right = [compare(case, profiled(step_of(layer_of(case)[0], "cuda")), gpu) for case in CASES]
    if not all(right):
        sys.exit("other kernels ran than the model has")


if __name__ == "__main__":
    main()
