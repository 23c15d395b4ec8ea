"""Runs suites of the benchmark with a progress bar, prints their tables, and writes JSON and plots."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch._dynamo.config as dynamo
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from align_ext.bench import layers, losses, plots, restructured, saved
from align_ext.bench.baselines import Sizes
from align_ext.bench.setting import Case, Setting
from align_ext.bench.timing import Comparison, as_json, machine, report
from align_ext.system.bounds import unknown_name
from align_ext.system.writing import atomic_file


def _step(setting: Setting) -> Iterator[Case]:
    from align_ext.bench import step  # needs transformers

    return step.step(setting)


def _quantised(setting: Setting) -> Iterator[Case]:
    from align_ext.bench import step

    return step.quantised(setting)


def _decode(setting: Setting) -> Iterator[Case]:
    from align_ext.bench import decode

    return decode.decode(setting)


def _sweep(setting: Setting) -> Iterator[Case]:
    yield from layers.sweep(setting)
    yield from losses.sweep(setting)


SUITES: dict[str, Callable[[Setting], Iterator[Case]]] = {
    "restructured": restructured.restructured,  # the first, so that a slow machine gives it its turns
    "layers": layers.layers,
    "heads": layers.several,
    "losses": losses.losses,
    "dispatch": layers.dispatch,
    "sweep": _sweep,
    "step": _step,
    "quantised": _quantised,
    "decode": _decode,
}
ASKED_FOR = ("quantised",)  # suites that run only where they are named
_QUICK = Setting(
    sizes=Sizes(tokens=16), shapes=((64, 96),), batches=(16,), visits=3, rounds=1, compiled=0, model="tiny", batch=5,
    seq_len=8, step_rounds=3, steps="few", goals=False,
)  # fmt: skip
_FULL = Setting(
    visits=8, rounds=5, seconds=3300, compiled=4, mixed=2, batch=8, step_rounds=5, step_seconds=math.inf,
    steps="every", step_dtypes=(torch.bfloat16, torch.float32),
)  # fmt: skip
_CUDA = {
    "sizes": Sizes(tokens=8192), "shapes": ((576, 1536), (2048, 5504), (4096, 11264)),
    "batches": (128, 256, 1024, 2048, 8192),
}  # fmt: skip


def setting(device: str = "auto", effort: str = "normal", model: str | None = None) -> Setting:
    """Returns the sizes of a run.

    Args:
        device: "cpu", "cuda", or "auto": a GPU if there is one.
        effort: "quick", "normal" or "full".
        model: another model than that of the effort (Setting.model).

    Raises:
        ValueError: there is no such device here.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(unknown_name("device", device, ("auto", "cpu", "cuda")))
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError('device="cuda": torch sees no CUDA device here; leave it out, or give --device cpu')
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    efforts = {"quick": _QUICK, "normal": Setting(), "full": _FULL}
    result = replace(efforts[effort], device=device)
    if device == "cpu" and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2"):
        result = replace(result, step_dtypes=(torch.float32,))  # bfloat16 takes twenty times as long
    if device == "cuda" and effort != "quick":
        result = replace(result, **_CUDA)  # type: ignore[arg-type]
    return result if model is None else replace(result, model=model)


def chosen(only: str | None) -> list[str]:
    """Returns the suites in a list separated by commas; None: all but those that must be named.

    Raises:
        ValueError: there is no such suite.
    """
    if only is None:
        return [name for name in SUITES if name not in ASKED_FOR]
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in SUITES:
            raise ValueError(unknown_name("suite", name, SUITES))
    if not names:
        raise ValueError(f"only={only!r} names no suite (known: {', '.join(SUITES)})")
    return names


class Outcome(NamedTuple):
    """What a run measured: comparisons by title, and the titles of those that it left out."""

    results: dict[str, Comparison]
    left_out: list[str]

    @property
    def restructured(self) -> tuple[list[restructured.Cell], list[str]]:
        """The cells of the suite restructured, and what of it was left out."""
        cells = restructured.cells(self.results)
        return cells, [title for title in self.left_out if title.startswith("restructured, ")]


def run(
    names: Sequence[str], how: Setting, json: Path | None = None, plot: Path | None = None, save: Path | None = None
) -> Outcome:
    """Measures suites, visit by visit, then prints their tables, and in which cells a restructured form is faster.

    Args:
        names: the names of the suites.
        how: the sizes.
        json: the file for all results so far, which is written after each visit to a comparison.
        plot: the file for the plots of the sweep; its suffix selects the format (.png, .svg, .pdf).
        save: the file for the figures of a complete run (saved.py).

    Returns:
        What it measured.
    """
    console = Console(soft_wrap=True)
    console = console if console.is_terminal else Console(width=120)
    console.print(machine(how.device), highlight=False, markup=False)
    begin = time.monotonic()
    left = 0  # visits

    def share() -> float:
        return max(0.0, begin + how.seconds - time.monotonic()) / max(left, 1)

    suites = {name: list(SUITES[name](replace(how, share=share))) for name in names}
    cases = [case for of_suite in suites.values() for case in of_suite]
    # All comparisons stay alive, since torch.compile compiles a function at most eight times, then gives up silently.
    dynamo.recompile_limit, dynamo.fail_on_recompile_limit_hit = 64, True
    results: dict[str, Comparison] = {}
    too_long: set[str] = set()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False) as progress:

            def print_line(title: str, what: str = "") -> None:
                progress.update(bar, description=f"{title}: {what}" if what else title)

            measured = {case.title: case.run(partial(print_line, case.title)) for case in cases}
            left = how.visits * len(cases)
            bar = progress.add_task("", total=left)
            for _ in range(how.visits):
                for title, visits in measured.items():
                    print_line(title)
                    if time.monotonic() < begin + how.seconds:
                        if result := next(visits, None):
                            results[title] = result  # whole steps are one visit
                            result.goals = result.goals if how.goals else {}
                        elif title not in results:
                            too_long.add(title)
                    left -= 1
                    progress.advance(bar)
                    if json is not None:
                        with atomic_file(json) as new:
                            new.write_text(as_json(how.device, results))
    finally:  # an interrupted run shows its results so far
        for title, comparison in results.items():
            report(title, comparison, console)
        outcome = Outcome(results, [case.title for case in cases if case.title not in results])
        variants = [f"{title}: {', '.join(c.left_out)}" for title, c in results.items() if c.left_out]
        why = {
            True: f"one round takes more than {how.longest_round:.0f} s here (--full: {_FULL.longest_round:.0f} s)",
            False: "this machine is slow (--only and --full leave more time)",
        }
        late = [f"Left out, as {why[what in too_long]}: {what}" for what in (*outcome.left_out, *variants)]
        for line in (*late, "", *restructured.summary(*outcome.restructured)):
            console.print(line, highlight=False, markup=False)
    if plot is not None:
        plots.write(plot, results, machine(how.device))
    if save is not None:
        with atomic_file(save) as new:
            before = save.read_text() if save.is_file() else None
            tables = saved.tables(cases, results)
            new.write_text(saved.content(how.device, suites, tables, time.monotonic() - begin, before))
        console.print(f"saved: {save}", highlight=False, markup=False)
    return outcome
