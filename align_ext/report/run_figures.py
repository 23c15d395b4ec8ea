"""The figures of a training run: losses by task, alignment over the steps and by layer, tasks, routing."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from align_ext.diagnostics.module_types import by_component, component_of
from align_ext.report.mechanism_figures import heat_maps
from align_ext.report.run_results import Run, TaskChange, is_beyond_noise
from align_ext.report.svg import COLOURS, INK, LINES, Picture, colour, legend_below, marker, picture, sheet, style

_MOST_POINTS = 300  # of a line; more are averaged, so that a page of many steps stays small
_MOST_ROWS = 40  # of a figure with one row a task
_MOST_NAMES = 30  # of a heat map
_TERMS = {
    "align_loss": "alignment loss", "balance_loss": "balance loss", "spectral_loss": "spectral loss",
    "orth_loss": "orthogonality loss",
    "grad_norm": "norm of the gradient", "learning_rate": "learning rate",
}  # fmt: skip
_GRID: dict[str, Any] = {"color": INK, "alpha": 0.12, "linewidth": 0.6}


def short(name: str, most: int = 26) -> str:
    """Returns a name for a figure: of a long one the start and the end."""
    return name if len(name) <= most else f"{name[: most - 9]}\N{HORIZONTAL ELLIPSIS}{name[-8:]}"


def losses(run: Run) -> Picture | None:
    """Draws the training loss over the steps, of all tokens and of each task; a figure for the top of the page."""
    found = [name for name in dict.fromkeys(key for entry in run.losses for key in entry) if name.startswith("loss/")]
    if not run.losses:
        return None
    last = {name: _line(run.losses, name)[1][-1] for name in found}
    named = sorted(sorted(found, key=lambda name: -last[name])[: len(COLOURS)])
    with style("losses"):
        figure = sheet(7.6, 3.6)
        panel = figure.add_subplot()
        for name in found:
            if name not in named:
                panel.plot(*_line(run.losses, name), color=INK, alpha=0.2, linewidth=0.7)
        for index, name in enumerate(named):
            steps, values = _line(run.losses, name)
            panel.plot(
                steps, values, LINES[index // len(COLOURS)], color=colour(index), linewidth=1.2, marker=marker(index),
                markersize=3.5, markevery=max(1, len(steps) // 12), label=short(name.removeprefix("loss/")),
            )  # fmt: skip
        if len(found) != 1:
            panel.plot(*_line(run.losses, "lm_loss"), color=INK, linewidth=2.2, label="all tokens")
        held_out = _line(run.results.get("evaluations", []), "eval_loss")
        if len(held_out[0]):
            panel.plot(*held_out, "--", color=INK, linewidth=1.4, label="held-out rows")
        _steps(panel)
        panel.set_ylabel("loss, nats a token")
        legend_below(figure, panel)
        caption = "Loss per answer token on the training batches of the logged steps, which are few rows each"
        caption += ", by task." if found else "."
        if len(found) > len(named):
            caption += f" Named are the {len(named)} tasks with the highest loss in the end; the others are grey."
        if len(held_out[0]):
            caption += " Dashed: the loss on held-out rows."
        return picture("losses", "Loss over the steps", caption, figure)


def terms(run: Run) -> Picture | None:
    """Draws the alignment, the other terms of the loss, the gradient's norm and the learning rate over the steps."""
    found = [name for name in _TERMS if len(_line(run.losses, name)[0]) > 1]
    if not found:
        return None
    columns = min(len(found), 3)
    rows = -(-len(found) // columns)
    with style("terms"):
        figure = sheet(2.55 * columns, 2.2 * rows)
        panels = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
        for index, (panel, name) in enumerate(zip(panels, found, strict=False)):
            panel.plot(*_line(run.losses, name), color=colour(index), linewidth=1.3)
            panel.set_title(_TERMS[name])
            panel.ticklabel_format(axis="y", scilimits=(-2, 4), useMathText=False)
            _steps(panel)
        for unused in panels[len(found) :]:
            unused.remove()
        names = ", ".join(_TERMS[name] for name in found)
        caption = f"Means since the step logged before: {names}. Terms of the loss are drawn without their weights."
        return picture("terms", "What training did, step by step", caption, figure)


def _steps(panel: Any) -> None:
    panel.set_xlabel("step")
    panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    panel.grid(**_GRID)


def _line(entries: Sequence[Mapping[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Returns steps and values of a logged number, at most _MOST_POINTS of each: means of equally many entries."""
    points = np.array([(entry["step"], entry[name]) for entry in entries if entry.get(name) is not None], float)
    if not len(points):
        return [], []
    parts = np.array_split(points, min(len(points), _MOST_POINTS))
    steps, values = np.array([part.mean(0) for part in parts]).T
    return steps.tolist(), values.tolist()


def changes(run: Run) -> Picture | None:
    """Draws the loss of each task before and after, and beside it the paired difference with its interval."""
    found = [change for change in run.changes if change.loss is not None]
    if not found:
        return None
    shown = sorted(found, key=lambda one: -abs(_estimate(one)))[:_MOST_ROWS]
    shown = [change for change in found if change in shown]
    with style("changes"):
        figure = sheet(7.6, 1.3 + 0.27 * len(shown))
        left, right = figure.subplots(1, 2, sharey=True)
        for place, one in enumerate(shown):
            before, after = one.before["loss"], one.after["loss"]
            tint = colour(_verdict_colour(one))
            left.plot([before, after], [place, place], "-", color=tint, linewidth=1.4, zorder=1)
            first = place == 0
            left.plot([before], [place], "o", color=INK, markerfacecolor="none", label="before" if first else None)
            left.plot([after], [place], "o", color=INK, label="after" if first else None)
            assert one.loss is not None
            right.plot([one.loss.low, one.loss.high], [place, place], "-", color=tint, linewidth=1.6)
            right.plot([one.loss.estimate], [place], "o", color=tint, markersize=6)
        right.axvline(0.0, color=INK, linewidth=0.8)
        left.set_yticks(range(len(shown)), [short(one.task) for one in shown])
        left.set_ylim(len(shown) - 0.4, -0.6)
        left.set_xlabel("loss, nats a token")
        right.set_xlabel("change of the loss  (\N{LEFTWARDS ARROW} better)")
        for panel in (left, right):
            panel.locator_params(axis="x", nbins=5)
            panel.grid(axis="x", **_GRID)
        legend_below(figure, left)
        caption = (
            "Loss on held-out rows before and after training, and its change with the 95% interval over rows, paired "
            "by row. Blue: better; orange: worse; grey: within noise."
        )
        if len(shown) < len(found):
            caption += f" The {len(shown)} tasks that changed most; the table has all."
        return picture("changes", "Loss before and after", caption, figure)


def _estimate(change: TaskChange) -> float:
    return change.loss.estimate if change.loss is not None else 0.0


def _verdict_colour(change: TaskChange) -> int:
    return 8 if not is_beyond_noise(change.loss) else 0 if _estimate(change) < 0 else 1


def layers(run: Run) -> Picture | None:
    """Draws the divergence of the tasks in each layer before and after training, a line a type of module."""
    found = [run.probe(when).get("layers") or {} for when in ("before", "after")]
    caption = (
        "Divergence of the tasks' latents in each layer, the mean over the pairs of tasks, on the probe: 0 means that "
        "the tasks share a space. Lower after than before: training brought the tasks together there."
    )
    return _by_depth(
        found, float, "layers", "Divergence of tasks by layer", "divergence, nats", caption + _own_space(run)
    )


def entropy(run: Run) -> Picture | None:
    """Draws the entropy of the routers in each layer before and after training."""
    found = [run.probe(when).get("routing") or {} for when in ("before", "after")]
    caption = "Entropy of the router's weights in each layer on the probe; 1: all heads alike, 0: one head a token."
    return _by_depth(found, lambda one: one["entropy"], "entropy", "Entropy of routing by layer", "entropy", caption)


def over_time(run: Run) -> Picture | None:
    """Draws the divergence of the tasks over the steps: a line a type of module, and all layers as a heat map."""
    found = [(step, of["layers"]) for step, of in run.measures() if of.get("layers")]
    caption = (
        "Divergence of the tasks' latents while training went on: the mean of each type of module, and each depth, "
        "the mean over its modules."
    )
    return _by_step(found, "over_time", "Divergence of tasks over the steps", "divergence, nats", caption)


def entropy_over_time(run: Run) -> Picture | None:
    """Draws the entropy of the routers over the steps."""
    found = [
        (step, {name: one["entropy"] for name, one in of["routing"].items()})
        for step, of in run.measures()
        if of.get("routing")
    ]
    caption = "Entropy of the routers' weights while training went on, by type of module and by depth."
    return _by_step(found, "entropy_over_time", "Entropy of routing over the steps", "entropy", caption)


def _by_step(
    found: Sequence[tuple[int, Mapping[str, float]]], name: str, title: str, unit: str, caption: str
) -> Picture | None:
    if len(found) < 3:  # before and after alone, which are figures of their own
        return None
    steps, depths = [step for step, _ in found], [_depths(one) for _, one in found]
    means: list[dict[int, float]] = []
    for one in depths:
        of_depth: dict[int, list[float]] = {}
        for depth, value in (point for points in one.values() for point in points):
            of_depth.setdefault(depth, []).append(value)
        means.append({depth: float(np.mean(values)) for depth, values in sorted(of_depth.items())})
    with style(name):
        figure = sheet(7.6, 3.1)
        left, right = figure.subplots(1, 2)
        for index, kind in enumerate(depths[0]):
            left.plot(
                steps, [np.mean([value for _, value in one[kind]]) for one in depths],
                LINES[index // len(COLOURS) % len(LINES)], marker=marker(index), markersize=4, color=colour(index),
                linewidth=1.2, label=short(kind),
            )  # fmt: skip
        _steps(left)
        left.set_ylabel(unit)
        values = np.array([list(one.values()) for one in means]).T
        drawn = right.pcolormesh(values, cmap="viridis", edgecolors="face", linewidth=0.2)
        right.set_xticks(np.arange(len(steps)) + 0.5, list(map(str, steps)))
        every = max(1, len(values) // 8)
        right.set_yticks(np.arange(0, len(values), every) + 0.5, list(means[0])[::every])
        right.invert_yaxis()
        right.set_xlabel("step")
        right.set_ylabel("layer")
        figure.colorbar(drawn, ax=right, label=unit)
        legend_below(figure, left)
        return picture(name, title, caption, figure)


def _by_depth(
    found: list[dict[str, Any]], value: Callable[[Any], float], name: str, title: str, unit: str, caption: str
) -> Picture | None:
    if not all(found):
        return None
    lines = [_depths({module: value(of) for module, of in one.items()}) for one in found]
    everything = [y for one in lines for points in one.values() for _, y in points]
    with style(name):
        figure = sheet(7.6, 3.1)
        panels = figure.subplots(1, 2, sharey=True)
        for panel, when, one in zip(panels, ("before", "after"), lines, strict=True):
            for index, (kind, points) in enumerate(one.items()):
                panel.plot(
                    *zip(*points, strict=True), LINES[index // len(COLOURS) % len(LINES)], marker=marker(index),
                    markersize=4, color=colour(index), linewidth=1.2, label=short(kind),
                )  # fmt: skip
            panel.set_title(f"{when} training")
            panel.set_xlabel("layer")
            panel.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            panel.grid(**_GRID)
        if min(everything) > 0 and max(everything) > 30 * min(everything):
            panels[0].set_yscale("log")
            panels[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panels[0].yaxis.set_major_formatter("{x:g}")
            panels[0].yaxis.set_minor_locator(NullLocator())
        panels[0].set_ylabel(unit)
        legend_below(figure, panels[0])
        return picture(name, title, caption, figure)


def _depths(modules: Mapping[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Returns (number of the layer, value) of each type of module; a name without a number stands at its place."""
    numbered = {}
    for place, (name, value) in enumerate(modules.items()):
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
        numbered[name] = (int(number[1]) if number else place, value)
    return {kind: sorted(points) for kind, points in by_component(numbered).items()}


def divergence(run: Run) -> Picture | None:
    """Draws the divergence of each pair of tasks before and after training as heat maps on one scale."""
    parts = [(when, run.probe(when)) for when in ("before", "after")]
    panels = [
        (f"{when} training", _names(part["tasks"]), np.array(part["divergence"], float))
        for when, part in parts
        if part.get("divergence")
    ]
    count = len(panels[0][1]) if panels else 0
    size = max(2.4, 0.21 * min(count, _MOST_NAMES) + 1.1)
    caption = (
        "Divergence of the latents of each pair of tasks on the probe, in nats, the mean over the layers; 0: the tasks "
        "share a space."
    )
    if count > _MOST_NAMES:
        caption += " The tasks are in the order of the table."
    return heat_maps(
        panels, "divergence", "Divergence of each pair of tasks", caption + _own_space(run), width=max(3.2, size),
        height=size,
    )  # fmt: skip


def _names(tasks: Sequence[str]) -> list[str]:
    return [short(task, 18) for task in tasks] if len(tasks) <= _MOST_NAMES else [""] * len(tasks)


def _own_space(run: Run) -> str:
    if run.results["adapters"].get("architecture") != "multi_adapter":
        return ""
    return " In a multi_adapter each task's latents are of its own adapter, so that they are in no common space."


def load(run: Run) -> Picture | None:
    """Draws how often each head of the routers is the first choice, before and after training, by type of module."""
    panels = []
    for when in ("before", "after"):
        kinds = by_component({name: one["load"] for name, one in (run.probe(when).get("routing") or {}).items()})
        heads = {len(one) for of_kind in kinds.values() for one in of_kind}
        if len(heads) == 1:
            means = np.array([np.mean(of_kind, axis=0) for of_kind in kinds.values()])
            panels.append((f"{when} training", [short(component_of(kind), 18) for kind in kinds], means))
    caption = (
        "Share of the tokens of the probe whose largest weight is that of each head, by type of module, the mean over "
        "the layers. A head with 0 is never the first choice."
    )
    return heat_maps(panels, "load", "Load of heads", caption, square=False, width=3.2)
