"""Interleaved timing: every variant once per round, medians and quartiles, ratios to the first variant.

The first variant is measured before and after every few others, each of which has a ratio to both: a clock that changes
within a round meets all alike. What a machine's other users and its memory do to a ratio changes within
minutes. So the rounds of a comparison are not measured in one go but in visits, between which others have their turn:
quartiles then show what another run may give.

On a GPU a time is that between two CUDA events. Before each call the GPU clears a buffer for longer than the CPU takes
to issue the call, so that the time is the device's alone (as in a model, where the CPU runs ahead) and the second-level
cache is cold; a call that waits for the device loses this head start. With host=True a time is the wall clock's, from
an idle device to an idle device: what a call costs that has nothing to compute.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align_ext.ops._native import build_info

# On a CPU a short call is measured by many in a row: the first one after other work takes up to 0.3 ms more, which says
# little about the call.
ROW_MS = 20
AT_A_TIME = 4  # variants between two calls of the first one
CLEARED_BYTES = 512 << 20  # more than any second-level cache
MARK = "align-lora bench"  # tells a file of times, which another may replace, from anything else
Call = Callable[[], object]
Baselines = dict[str, list[tuple[float, ...]]]


@dataclass(frozen=True)
class Goal:
    """What a variant should reach: a ratio to the first variant, or a time in ms, of at most (or at least) a limit."""

    limit: float
    at_least: bool = False
    in_ms: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{' ms' if self.in_ms else ''}"


@dataclass
class Comparison:
    """What was measured of some variants.

    Attributes:
        times_ms: milliseconds of each variant, one a round; more of the first one.
        bytes_moved: by each variant, if that is known.
        tokens: that a call of each variant works on, where tokens per second say something.
        baselines: of each time of another variant what it is divided by: the first one's before and after it.
        peak_mib: the largest memory of each variant's process, or of the device.
        goals: of some variants.
        point: what is varied, and its value here: ("heads", 4), for plots.
    """

    times_ms: dict[str, list[float]]
    bytes_moved: int | None = None
    tokens: int | None = None
    baselines: Baselines = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    goals: dict[str, Goal] = field(default_factory=dict)
    point: tuple[str, int] | None = None

    def ratios(self, name: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of a variant's ratios to the first one."""
        if name not in self.baselines:
            return 1.0, 1.0, 1.0
        rounds = zip(self.times_ms[name], self.baselines[name], strict=True)
        ratios = [time / baseline for time, baselines in rounds for baseline in baselines]
        low, mid, high = statistics.quantiles(ratios, n=4, method="inclusive")
        return low, mid, high

    def per(self, count: int) -> Comparison:
        """The same of one of so many parts of each call."""
        times = {name: [ms / count for ms in values] for name, values in self.times_ms.items()}
        baselines = {
            name: [tuple(ms / count for ms in of_time) for of_time in values] for name, values in self.baselines.items()
        }
        return replace(self, times_ms=times, baselines=baselines)

    def reaches(self, name: str) -> bool | None:
        """Whether a variant reaches its goal by the median; None without one."""
        goal = self.goals.get(name)
        if goal is None:
            return None
        value = statistics.median(self.times_ms[name]) if goal.in_ms else self.ratios(name)[1]
        return value >= goal.limit if goal.at_least else value <= goal.limit


def wall_clock(call: Call) -> float:
    """Milliseconds until a call is done, on the GPU too."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def between_events(call: Call) -> float:
    """Milliseconds of the GPU between what was issued before a call and what will be issued after it."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


@functools.cache
def _cleared() -> torch.Tensor:
    return torch.empty(CLEARED_BYTES, dtype=torch.uint8, device="cuda")


def gpu_clock(calls: list[Call]) -> Callable[[Call], float]:
    """A clock for these calls, which were called before, by CUDA events after a head start of the CPU."""
    buffer = _cleared()
    between_events(buffer.zero_)
    clearing = between_events(buffer.zero_)
    issue = []
    for call in calls:
        start = time.perf_counter()
        call()
        issue.append(1e3 * (time.perf_counter() - start))
        torch.cuda.synchronize()
    repeats = 1 + int(2 * max(issue) / clearing)

    def clock(call: Call) -> float:
        for _ in range(repeats):
            buffer.zero_()
        return between_events(call)

    return clock


def visits(
    variants: dict[str, Call], rounds: int, device: str, *, host: bool = False, repeats: int = 1, row_ms: float = 0,
    seconds: float = math.inf,
) -> Iterator[Comparison]:  # fmt: skip
    """Times of the variants, which take turns, after warm-up calls of each: after every visit all times so far.

    Args:
        variants: by name; the first one is what the others are compared with.
        rounds: of a visit at most.
        device: "cpu" or "cuda".
        host: measure what calling costs (see above).
        repeats: calls that make one measurement, for calls that a clock can hardly see.
        row_ms: on a CPU each variant is repeated until one measurement takes so long, so that a short call does not
            pay for the caches that a long one leaves behind.
        seconds: after which a visit begins no further round; it has one at least.
    """
    times: dict[str, list[float]] = {name: [] for name in variants}
    for call in variants.values():
        for _ in range(3 if device == "cuda" else 1):
            wall_clock(call)
    clock = wall_clock if host or device == "cpu" else gpu_clock(list(variants.values()))
    row = dict.fromkeys(variants, repeats)
    if row_ms and device == "cpu":
        row = {name: max(repeats, round(row_ms / wall_clock(call))) for name, call in variants.items()}
    repeated = {name: _repeated(call, row[name]) for name, call in variants.items()}
    first, *others = repeated
    groups = [others[begin : begin + AT_A_TIME] for begin in range(0, max(len(others), 1), AT_A_TIME)]
    baselines: Baselines = {name: [] for name in others}

    def take(name: str) -> float:
        times[name].append(clock(repeated[name]) / row[name])
        return times[name][-1]

    while True:
        start = time.monotonic()
        before = take(first)
        for done in range(rounds):
            if done and time.monotonic() - start > seconds:
                break
            for group in groups:
                for name in group:
                    take(name)
                after = take(first)
                for name in group:
                    baselines[name].append((before, after))
                before = after
        yield Comparison(times, baselines=baselines)


def measure(variants: dict[str, Call], rounds: int, device: str, **options: Any) -> Comparison:
    """The times of one visit (see `visits`)."""
    return next(visits(variants, rounds, device, **options))


def _repeated(call: Call, repeats: int) -> Call:
    def run() -> None:
        for _ in range(repeats):
            call()

    return call if repeats == 1 else run


def training_step(
    call: Callable[..., torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor | None = None
) -> Callable[[], None]:
    """Forward and backward of y = call(*leaves), whose gradients are dropped; a loss needs no dy."""
    trained = [leaf.detach().requires_grad_() for leaf in leaves]

    def run() -> None:
        call(*trained).backward(dy)
        for leaf in trained:
            leaf.grad = None

    return run


def report(title: str, comparison: Comparison, console: Console | None = None) -> None:
    """Prints a table: the ratio to the first variant with its quartiles over the rounds, then what else is known."""
    moved, tokens = comparison.bytes_moved, comparison.tokens
    more = {"goal": comparison.goals, "GB/s": moved, "tokens/s": tokens, "peak MiB": comparison.peak_mib}
    table = Table("variant", "ratio", "quartiles", "median ms", *(name for name, known in more.items() if known))
    for name, values in comparison.times_ms.items():
        low, mid, high = comparison.ratios(name)
        median = statistics.median(values)
        row = [f"{mid:.3f}", f"{low:.3f} .. {high:.3f}", f"{median:.3f}"]
        if comparison.goals:
            verdict = {None: "", True: "reached", False: "missed"}[comparison.reaches(name)]
            row.append(f"{comparison.goals[name]} {verdict}" if verdict else "")
        if moved:
            row.append(f"{moved / median / 1e6:.0f}")
        if tokens:
            row.append(f"{1e3 * tokens / median:.0f}")
        if comparison.peak_mib:
            row.append(f"{comparison.peak_mib[name]:.0f}")
        table.add_row(name, *row)
    console = console or Console(width=120)
    console.print(f"\n{title}", highlight=False, markup=False)
    console.print(table)


def machine(device: str) -> str:
    """The machine in one line: absolute times mean nothing without it."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    features = torch.backends.cpu.get_cpu_capability() + (" with AMX" if build_info.uses_amx() else "")
    return f"{platform.machine()} {features}, {torch.get_num_threads()} threads, torch {torch.__version__}, CPU"


def as_json(device: str, results: dict[str, Comparison]) -> str:
    """The machine, and all that was measured, for other programs."""
    about = {"written_by": MARK, "machine": machine(device)}
    return json.dumps(about | {title: asdict(c) for title, c in results.items()})


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
        print(as_json(options.device, results))
        return
    print(machine(options.device))
    for title, comparison in results.items():
        report(title, comparison)
