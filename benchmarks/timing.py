"""Interleaved timing: every variant once per round, medians and quartiles, ratios to the first variant.

On a GPU a time is that between two CUDA events. Before each call the GPU clears a buffer for longer than the CPU takes
to issue the call, so that the time is the device's alone (as in a model, where the CPU runs ahead) and the second-level
cache is cold; a call that waits for the device loses this head start. With host=True a time is the wall clock's, from
an idle device to an idle device: what a call costs that has nothing to compute.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from rich.console import Console
from rich.table import Table

CLEARED_BYTES = 512 << 20  # more than any second-level cache


@dataclass
class Comparison:
    """Milliseconds of each variant, one a round, and the bytes that each of them moves, if that is known."""

    times_ms: dict[str, list[float]]
    bytes_moved: int | None = None


def wall_clock(call: Callable[[], object]) -> float:
    """Milliseconds until a call is done, on the GPU too."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def between_events(call: Callable[[], object]) -> float:
    """Milliseconds of the GPU between what was issued before a call and what will be issued after it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def gpu_clock(calls: list[Callable[[], object]]) -> Callable[[Callable[[], object]], float]:
    """A clock for these calls, which were called before, by CUDA events after a head start of the CPU."""
    buffer = torch.empty(CLEARED_BYTES, dtype=torch.uint8, device="cuda")
    between_events(buffer.zero_)
    clearing = between_events(buffer.zero_)
    issue = []
    for call in calls:
        start = time.perf_counter()
        call()
        issue.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    repeats = 1 + int(2 * max(issue) / clearing)

    def clock(call: Callable[[], object]) -> float:
        for _ in range(repeats):
            buffer.zero_()
        return between_events(call)

    return clock


def measure(
    variants: dict[str, Callable[[], object]],
    rounds: int,
    device: str,
    *,
    host: bool = False,
    bytes_moved: int | None = None,
) -> Comparison:
    """Times of the variants, which take turns, after warm-up calls of each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        for _ in range(3 if device == "cuda" else 1):
            wall_clock(call)
    clock = wall_clock if host or device == "cpu" else gpu_clock(list(variants.values()))
    for _ in range(rounds):
        for name, call in variants.items():
            times[name].append(clock(call))
    return Comparison(times, bytes_moved)


def training_step(
    call: Callable[..., torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor | None = None
) -> Callable[[], None]:
    """Forward and backward of y = call(*leaves), with new gradients each time; a loss needs no dy."""
    trained = [leaf.detach().requires_grad_() for leaf in leaves]

    def run() -> None:
        for leaf in trained:
            leaf.grad = None
        call(*trained).backward(dy)

    return run


def report(title: str, comparison: Comparison) -> None:
    """Prints a table: the ratio to the first variant with its quartiles over the rounds, the median time, and GB/s."""
    baseline, moved = next(iter(comparison.times_ms.values())), comparison.bytes_moved
    columns = ["variant", "ratio", "quartiles", "median ms", *(["GB/s"] if moved else [])]
    table = Table(*columns)
    for name, values in comparison.times_ms.items():
        ratios = [v / b for v, b in zip(values, baseline, strict=True)]
        low, mid, high = statistics.quantiles(ratios, n=4, method="inclusive")
        median = statistics.median(values)
        speed = [f"{moved / median / 1e6:.0f}"] if moved else []
        table.add_row(name, f"{mid:.3f}", f"{low:.3f} .. {high:.3f}", f"{median:.3f}", *speed)
    print(f"\n{title}")
    Console(width=110).print(table)


def machine(device: str) -> str:
    """The machine in one line: absolute times mean nothing without it."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    features = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {features}, {torch.get_num_threads()} threads, torch {torch.__version__}, CPU"


def main(run: Callable[[str, str], dict[str, Comparison]]) -> None:
    """Runs a benchmark and prints tables, or with --json its times.

    Args:
        run: comparisons by title, of a device ("cpu" or "cuda") at the sizes "cpu", "cuda" or "quick".
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="sizes that say nothing, to see that it runs")
    parser.add_argument("--json", action="store_true", help="all times, for other programs")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device here")
    results = run(options.device, "quick" if options.quick else options.device)
    if options.json:
        print(json.dumps({"machine": machine(options.device)} | {title: asdict(c) for title, c in results.items()}))
        return
    print(machine(options.device))
    for title, comparison in results.items():
        report(title, comparison)
