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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from align_ext.ops._native import build_info

# On a CPU, a short call is measured by many calls in a row, since the first one after other work takes up to 0.3 ms
# more.
ROW_MS = 20
AT_A_TIME = 4  # the number of variants between two calls of the first one
CLEARED_BYTES = 512 << 20  # more than any second-level cache
MARK = "align-lora bench"  # identifies files of times, which may be overwritten
Call = Callable[[], object]
Baselines = dict[str, list[tuple[float, ...]]]


@dataclass(frozen=True)
class Goal:
    """A limit on a variant's ratio to the first variant, or on its time in ms: at most, or at least."""

    limit: float
    at_least: bool = False
    in_ms: bool = False

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.limit:g}{' ms' if self.in_ms else ''}"


@dataclass
class Comparison:
    """The measurements of some variants.

    Attributes:
        times_ms: milliseconds of each variant, one per round; more of the first one.
        bytes_moved: the bytes that each variant moves, if known.
        tokens: the tokens per call of each variant, if tokens per second are of interest.
        baselines: the divisor of each time of another variant: the first variant's times before and after it.
        peak_mib: the largest memory of each variant's process, or of the device.
        goals: the goals of some variants.
        restructured: the variants that a variant of the same round restructures: ours -> the other.
        point: the varied quantity and its value, such as ("heads", 4), for plots.
        left_out: the variants for which the run had no time.
    """

    times_ms: dict[str, list[float]]
    bytes_moved: int | None = None
    tokens: int | None = None
    baselines: Baselines = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    goals: dict[str, Goal] = field(default_factory=dict)
    restructured: dict[str, str] = field(default_factory=dict)
    point: tuple[str, int] | None = None
    left_out: Sequence[str] = ()

    def ratios(self, name: str) -> tuple[float, float, float]:
        """Returns lower quartile, median and upper quartile of a variant's ratios to the first one."""
        if name not in self.baselines:
            return 1.0, 1.0, 1.0
        rounds = zip(self.times_ms[name], self.baselines[name], strict=True)
        return quartiles([time / baseline for time, baselines in rounds for baseline in baselines])

    def to_restructured(self, name: str) -> tuple[float, float, float]:
        """Returns the quartiles of a variant's ratios to the restructured one of the same round."""
        times = zip(self.times_ms[name], self.times_ms[self.restructured[name]], strict=True)
        return quartiles([ours / other for ours, other in times])

    def per(self, count: int) -> Comparison:
        """Returns the measurements divided by the number of equal parts of each call."""
        times = {name: [ms / count for ms in values] for name, values in self.times_ms.items()}
        baselines = {
            name: [tuple(ms / count for ms in of_time) for of_time in values] for name, values in self.baselines.items()
        }
        return replace(self, times_ms=times, baselines=baselines)

    def reaches(self, name: str) -> bool | None:
        """Whether the median of a variant reaches its goal; None without a goal."""
        goal = self.goals.get(name)
        if goal is None:
            return None
        value = statistics.median(self.times_ms[name]) if goal.in_ms else self.ratios(name)[1]
        return value >= goal.limit if goal.at_least else value <= goal.limit


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Returns lower quartile, median and upper quartile."""
    low, mid, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else 3 * values
    return low, mid, high


def wall_clock(call: Call) -> float:
    """Measures milliseconds until a call is done, including work on the GPU."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def between_events(call: Call) -> float:
    """Measures a call's milliseconds on the GPU by events before and after it."""
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
    """Returns a clock for warmed-up calls, by CUDA events after a head start of the CPU."""
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


def endless() -> float:
    """The time of a visit that ends by its rounds."""
    return math.inf


def visits(
    variants: dict[str, Call], rounds: int, device: str, *, host: bool = False, repeats: int = 1, row_ms: float = 0,
    least: int = 1, seconds: Callable[[], float] = endless,
) -> Iterator[Comparison]:  # fmt: skip
    """Measures the variants in turn after warm-up calls; yields all times so far after every visit.

    Args:
        variants: the variants by name; the others are compared with the first one.
        rounds: the most rounds of a visit.
        device: "cpu" or "cuda".
        host: measure the cost of calling (see above).
        repeats: the number of calls in one measurement, for very short calls.
        row_ms: on a CPU each variant is repeated until one measurement takes so long, so that a short call does not
            pay for the caches that a long one leaves behind.
        least: the least rounds of a visit.
        seconds: returns, at the start of a visit, the time after which it begins no further round.
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

    def time_of(name: str) -> float:
        return clock(repeated[name]) / row[name]

    while True:
        end = time.monotonic() + seconds()
        times[first].append(time_of(first))
        for done in range(max(rounds, least)):
            if done >= least and time.monotonic() > end:
                break
            for group in groups:  # all of it is kept, or nothing: a run may be interrupted
                measured = {name: time_of(name) for name in group}
                between = times[first][-1], time_of(first)
                times[first].append(between[1])
                for name, ms in measured.items():
                    times[name].append(ms)
                    baselines[name].append(between)
        yield Comparison(times, baselines=baselines)


def measure(variants: dict[str, Call], rounds: int, device: str, **options: Any) -> Comparison:
    """Returns the times of one visit (see `visits`)."""
    return next(visits(variants, rounds, device, **options))


def _repeated(call: Call, repeats: int) -> Call:
    def run() -> None:
        for _ in range(repeats):
            call()

    return call if repeats == 1 else run


def training_step(
    call: Callable[..., torch.Tensor], leaves: list[torch.Tensor], dy: torch.Tensor | None = None
) -> Callable[[], None]:
    """Returns a call of forward and backward of y = call(*leaves), without keeping gradients; a loss needs no dy."""
    trained = [leaf.detach().requires_grad_() for leaf in leaves]

    def run() -> None:
        call(*trained).backward(dy)
        for leaf in trained:
            leaf.grad = None

    return run


def report(title: str, comparison: Comparison, console: Console | None = None) -> None:
    """Prints a table: the ratio to the first variant with its quartiles over the rounds, then other measurements."""
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
    """Describes the machine in one line, since absolute times depend on it."""
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    features = torch.backends.cpu.get_cpu_capability()
    features += f" with {unit}" if (unit := build_info.bfloat16_unit()) else ""
    return f"{platform.machine()} {features}, {torch.get_num_threads()} threads, torch {torch.__version__}, CPU"


def as_json(device: str, results: dict[str, Comparison]) -> str:
    """Returns the machine and all measurements as JSON."""
    about = {"written_by": MARK, "machine": machine(device)}
    return json.dumps(about | {title: asdict(c) for title, c in results.items()})


def main(run: Callable[[str, str], dict[str, Comparison]]) -> None:
    """Runs a benchmark and prints tables, or with --json its times.

    Args:
        run: returns comparisons by title for a device ("cpu" or "cuda") and the sizes "cpu", "cuda" or "quick".
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
        last = ", ".join(f"{name} {comparison.ratios(name)[1]:.2f}" for name in comparison.times_ms)
    print(f"figure: {title}: {last}")  # the last table in a line
