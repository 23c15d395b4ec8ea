"""Interleaved timing: every variant once per round, medians and quartiles, ratios to the first variant."""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table


def measure(variants: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each variant, [rounds] a variant, after one warm-up call of each."""
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        call()
    for _ in range(rounds):
        for name, call in variants.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def report(title: str, times: dict[str, list[float]]) -> None:
    """Prints a table: the ratio to the first variant with its quartiles over the rounds, and the median time."""
    baseline = next(iter(times.values()))
    table = Table("variant", "ratio", "quartiles", "median ms", title=title, title_justify="left")
    for name, values in times.items():
        low, mid, high = statistics.quantiles([v / b for v, b in zip(values, baseline, strict=True)], n=4)
        table.add_row(name, f"{mid:.3f}", f"{low:.3f} .. {high:.3f}", f"{statistics.median(values):.3f}")
    Console(width=110).print(table)


def machine() -> str:
    """The machine in one line: absolute times mean nothing without it."""
    features = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {features}, {torch.get_num_threads()} threads, torch {torch.__version__}, CPU"


def main(run: Callable[[], dict[str, dict[str, list[float]]]]) -> None:
    """Runs a benchmark and prints tables, or with --json its times in milliseconds."""
    results = run()
    if "--json" in sys.argv:
        print(json.dumps({"machine": machine(), "times_ms": results}))
        return
    print(machine())
    for title, times in results.items():
        report(title, times)
