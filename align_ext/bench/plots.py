"""Plots of a sweep: the cost of an adapter against tokens, rank, heads and tasks."""

import statistics
from pathlib import Path
from typing import Any

from align_ext.bench.timing import Comparison
from align_ext.system.writing import atomic_file, check_file

MARK = "align-lora bench: plot of a sweep"  # identifies plots, which may be overwritten
_MARKED = {"png": "Software", "svg": "Creator", "pdf": "Creator", "ps": "Creator", "eps": "Creator"}


def check(path: Path) -> None:
    """Raises ValueError if no plot can be written to a path."""
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ModuleNotFoundError as error:
        raise ValueError("plots need matplotlib: pip install matplotlib") from error
    endings = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.removeprefix(".") not in endings:
        raise ValueError(f"plot={str(path)!r}: the ending must be one of .{', .'.join(endings)}")
    check_file("plot", path, MARK)


def points(results: dict[str, Comparison]) -> dict[str, dict[str, list[tuple[int, float, float, float]]]]:
    """Returns the lines of the plots: axis -> variant -> (value, lower quartile, median, upper quartile).

    Of layers the ratio to the frozen layer; of a loss, which has no frozen part, milliseconds.
    """
    lines: dict[str, dict[str, list[tuple[int, float, float, float]]]] = {}
    for comparison in results.values():
        if comparison.point is None:
            continue
        axis, value = comparison.point
        names = list(comparison.times_ms)
        for name in names if axis == "tasks" else names[1:]:
            if axis == "tasks":
                low, mid, high = statistics.quantiles(comparison.times_ms[name], n=4, method="inclusive")
            else:
                low, mid, high = comparison.ratios(name)
            lines.setdefault(axis, {}).setdefault(name, []).append((value, low, mid, high))
    return lines


def write(path: Path, results: dict[str, Comparison], caption: str) -> None:
    """Draws one panel for each axis; medians, with quartiles as bars."""
    from matplotlib.figure import Figure

    lines = points(results)
    figure: Any = Figure(figsize=(4 * max(len(lines), 1), 3.6), layout="constrained")
    for index, (axis, variants) in enumerate(lines.items()):
        panel = figure.add_subplot(1, len(lines), index + 1)
        for name, of_variant in variants.items():
            x, low, mid, high = zip(*of_variant, strict=True)
            below, above = ([abs(a - b) for a, b in zip(mid, other, strict=True)] for other in (low, high))
            panel.errorbar(x, mid, yerr=[below, above], marker="o", markersize=3, capsize=2, label=name)
        panel.set_xlabel(axis)
        panel.set_ylabel("ms" if axis == "tasks" else "ratio to the frozen layer alone")
        panel.set_ylim(bottom=0)
        panel.legend(fontsize=7)
    figure.suptitle(caption, fontsize=8)
    with atomic_file(path) as new:
        kind = path.suffix.removeprefix(".").lower()
        marked = {_MARKED[kind]: MARK} if kind in _MARKED else None  # plots of other formats cannot be overwritten
        figure.savefig(new, format=kind, metadata=marked)
