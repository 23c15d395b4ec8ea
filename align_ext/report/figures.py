"""The figures of a study's scores: differences, cost, sweeps."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from align_ext.report import statistics
from align_ext.report.chosen import Arms, Variant
from align_ext.report.compared import FEW_RESAMPLES, LOWER_IS_BETTER, Comparison, is_aligned, is_control
from align_ext.report.run_tables import of_cells, step_ratio
from align_ext.report.svg import INK, Picture, colour, legend_below, marker, picture, sheet, style
from align_ext.report.tables import MEASURES


def forest(arms: Arms, groups: Sequence[list[Comparison]], name: str, title: str) -> Picture | None:
    """Draws the differences to the baseline with their intervals, one panel a measure; controls are hollow."""
    groups = [found for found in groups if found]
    if not groups:
        return None
    labels = list(dict.fromkeys(one.variant.label for found in groups for one in found))
    with style(name):
        figure = sheet(7.6, 1.1 + 0.27 * len(labels))
        panels = figure.subplots(1, len(groups), sharey=True, squeeze=False)[0]
        for panel, found in zip(panels, groups, strict=True):
            points = found[0].measure in ("accuracy", "exact")
            scale = 100.0 if points else 1.0
            panel.axvline(0.0, color=INK, linewidth=0.8)
            if points:
                margin = scale * arms.results.plan["margin"]
                panel.axvspan(-margin, margin, color=INK, alpha=0.07, linewidth=0)
            for one in found:
                _interval(panel, labels.index(one.variant.label), one, scale, _role(arms, one.variant))
            lower = found[0].measure in LOWER_IS_BETTER
            better = "\N{LEFTWARDS ARROW} better" if lower else "better \N{RIGHTWARDS ARROW}"
            unit = "points" if points else "nats"
            panel.set_title(MEASURES[found[0].measure][0])
            panel.set_xlabel(f"minus {arms.results.baseline}, {unit}  ({better})")
            panel.locator_params(axis="x", nbins=min(5, 7 - len(groups)))
            panel.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
        panels[0].set_yticks(range(len(labels)), labels)
        panels[0].set_ylim(len(labels) - 0.4, -0.6)
        shown = {_role(arms, one.variant) for found in groups for one in found}
        for role, (tint, face, mark) in _ROLES.items():
            if role in shown:
                panels[0].plot([], [], mark, color=tint, markerfacecolor=face, label=role, markersize=6)
        legend_below(figure, panels[0])
        caption = (
            f"Difference of each arm to {arms.results.baseline} with its 95% interval over rows and seeds. "
            " Controls are hollow: an arm that is no better than they are owes nothing to alignment."
        )
        if any(found[0].measure == "accuracy" for found in groups):
            caption += " Grey: the margin within which accuracies count as equal."
        return picture(name, title, caption, figure)


_ROLES = {
    "aligned": (colour(0), colour(0), "o"),
    "control": (colour(1), "none", "s"),
    "other": (colour(8), colour(8), "D"),
}


def _role(arms: Arms, variant: Variant) -> str:
    return "control" if is_control(arms, variant) else "aligned" if is_aligned(arms, variant) else "other"


def _interval(panel: Any, place: int, one: Comparison, scale: float, role: str) -> None:
    tint, face, mark = _ROLES[role]
    of = one.difference
    panel.plot([scale * of.low, scale * of.high], [place, place], "-", color=tint, linewidth=1.6)
    panel.plot(
        [scale * of.estimate], [place], mark, color=tint, markerfacecolor=face, markersize=6, markeredgewidth=1.4
    )


def pareto(arms: Arms, measure: str) -> Picture | None:
    """Draws the score against the time of a step and against the trained parameters, with the front."""
    time, parameters = "time of a step, ratio", "trained parameters, millions"
    points: dict[str, list[tuple[float, float, str]]] = {time: [], parameters: []}
    scale = 100.0 if MEASURES[measure][1] == "points" else 1.0
    for variant in arms.trained:
        x, tasks = arms.values(variant, "test", measure)
        if x.shape[1] > 1:
            value = scale * statistics.interval(x, tasks, resamples=FEW_RESAMPLES).estimate
            if ratio := step_ratio(variant, arms.baseline(variant) or variant):
                points[time].append((ratio[1], value, variant.label))
            points[parameters].append((arms.results.arms[variant.arm]["parameters"] / 1e6, value, variant.label))
    axes = {title: there for title, there in points.items() if len({x for x, *_ in there}) > 1}
    if not axes:
        return None
    with style("pareto"):
        figure = sheet(7.6, 3.2)
        panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
        for panel, (title, there) in zip(panels, axes.items(), strict=True):
            front = _front([(x, y) for x, y, _ in there], measure in LOWER_IS_BETTER)
            panel.plot(*zip(*front, strict=True), color=INK, alpha=0.45, linewidth=0.8, zorder=1)
            for cost, y, label in there:
                index, shown = arms.index(label), label if panel is panels[0] else None
                panel.plot([cost], [y], marker(index), color=colour(index), markersize=7, label=shown)
            panel.set_xlabel(title)
            panel.grid(color=INK, alpha=0.12, linewidth=0.6)
            panel.margins(0.12)
        panels[0].set_ylabel(f"{MEASURES[measure][0]}{', nats' if scale == 1 else ', %'}")
        figure.legend(loc="outside right center")
        caption = (
            f"{MEASURES[measure][0]} against cost. The line joins the arms that no other arm beats in both; "
            "whether points differ by more than noise is in the table of differences."
        )
        return picture("pareto", "What a score costs", caption, figure)


def _front(points: list[tuple[float, float]], lower: bool) -> list[tuple[float, float]]:
    """Returns the points that none beats in both, from the cheapest on."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(points, key=lambda one: (one[0], one[1] if lower else -one[1])):
        if not front or (y < front[-1][1] if lower else y > front[-1][1]):
            front.append((x, y))
    return front


def sweeps(arms: Arms) -> list[Picture]:
    """Draws scores, and the alignment on the probe, against each numeric axis that is swept; a line an arm."""
    plan = arms.results.plan
    axes = [
        axis for axis, values in plan["vary"].items()
        if axis not in plan["choose"] and len(values) > 1 and all(isinstance(value, (int, float)) for value in values)
    ]  # fmt: skip
    return [found for axis in axes if (found := _sweep(arms, axis)) is not None]


def _sweep(arms: Arms, axis: str) -> Picture | None:
    measures = [measure for measure in ("choice_nll", "accuracy", "exact") if any(
        arms.values(one, "test", measure)[0].shape[1] > 1 for one in arms.trained)]  # fmt: skip
    if not measures:
        return None
    lines: dict[str, list[tuple[float | None, Variant]]] = {}
    for variant in arms.trained:
        rest = [f"{name} {value}" for name, value in variant.point if name != axis]
        lines.setdefault(", ".join([variant.arm, *rest]), []).append((dict(variant.point).get(axis), variant))
    probed = any(of_cells(one, lambda cell: cell.content["alignment"]["kl"]) for one in arms.trained)
    name = f"sweep_{axis}"
    with style(name):
        figure = sheet(7.6, 3.3)
        panels = figure.subplots(1, len(measures) + probed, squeeze=False)[0]
        for panel, measure in zip(panels, [*measures, "kl"], strict=False):
            for index, (label, points) in enumerate(lines.items()):
                _line(arms, panel, index, label, points, measure)
            title = MEASURES[measure][0] if measure in MEASURES else "KL on the probe"
            panel.set_title(f"{title}{', %' if MEASURES.get(measure, ('', ''))[1] == 'points' else ''}")
            panel.set_xlabel(axis)
            panel.grid(color=INK, alpha=0.12, linewidth=0.6)
            panel.locator_params(nbins=5)
        legend_below(figure, panels[0])
        caption = (
            f"Mean over tasks against {axis}; bands: 95% intervals over rows and seeds. Flat: an arm without {axis}."
        )
        return picture(name, f"Scores against {axis}", caption, figure)


def _line(
    arms: Arms, panel: Any, index: int, label: str, points: list[tuple[float | None, Variant]], measure: str
) -> None:
    drawn = []
    for x, variant in points:
        if measure == "kl":
            values = of_cells(variant, lambda cell: cell.content["alignment"]["kl"])
            found = (min(values), float(np.mean(values)), max(values)) if values else None
        else:
            of_rows, tasks = arms.values(variant, "test", measure)
            one = statistics.interval(of_rows, tasks) if of_rows.shape[1] > 1 else None
            scale = 100.0 if MEASURES[measure][1] == "points" else 1.0
            found = (scale * one.low, scale * one.estimate, scale * one.high) if one else None
        if found:
            drawn.append((x, *found))
    if len(drawn) == 1 and drawn[0][0] is None:
        panel.axhline(drawn[0][2], color=colour(index), linestyle="--", linewidth=1.2, label=label)
    elif drawn:
        places, low, mid, high = zip(*sorted(drawn, key=lambda one: one[0] or 0.0), strict=True)
        panel.fill_between(places, low, high, color=colour(index), alpha=0.15, linewidth=0)
        panel.plot(places, mid, marker=marker(index), markersize=4, color=colour(index), linewidth=1.4, label=label)
