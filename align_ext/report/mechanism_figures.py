"""The figures of the mechanism: what training did to heads, latents, gradients and routers."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import matplotlib
import numpy as np

from align_ext.report.chosen import Arms
from align_ext.report.run_tables import by_category, mechanism
from align_ext.report.svg import INK, LINES, Picture, colour, legend_below, marker, picture, sheet, style

_MOST_PANELS = 9  # of one figure
_TEXT_IN_CELLS = 8  # more rows or columns than these have no numbers in a heat map


def mechanism_pictures(arms: Arms) -> list[Picture]:
    """Draws all that the cells have measured of the mechanism."""
    heads = by_category(arms, "heads"), by_category(arms, "heads_change")
    conflict = by_category(arms, "conflict", "component"), by_category(arms, "conflict", "block")
    entropy = by_category(arms, "routing", "entropy")
    cosine = "mean cosine"
    found = [
        boxes(arms, heads[0], "heads", "Similarity of heads by module", cosine,
              "Cosine similarity of pairs of heads, the mean of each layer, by type of module; all layers and seeds."),
        boxes(arms, heads[1], "heads_change", "Similarity of what heads have learned", cosine,
              "The same of the change of each head since the start of training, which a common start cannot hide."),
        latents(arms),
        divergence(arms),
        dots(arms, conflict[0], "conflict", "Gradient conflict between tasks, by component",
             "Share of the pairs of tasks, over all layers, whose gradients oppose each other (negative cosine), by "
             "component; mean over seeds."),
        dots(arms, conflict[1], "conflict_blocks", "Gradient conflict between tasks, by block", "The same by block."),
        bands(arms, "gradients"),
        bands(arms, "heads"),
        boxes(arms, entropy, "routing_entropy", "Entropy of routing by module", "entropy",
              "Entropy of the router's weights in each layer; low: a token uses one head."),
        load(arms),
    ]  # fmt: skip
    return [one for one in found if one is not None]


def boxes(
    arms: Arms, groups: dict[str, dict[str, list[float]]], name: str, title: str, unit: str, caption: str
) -> Picture | None:
    """Draws boxes (median, quartiles, whiskers to 1.5 interquartile ranges) by category, side by side for each arm."""
    categories = list(dict.fromkeys(category for arm in groups.values() for category in arm))
    if not categories:
        return None
    with style(name):
        figure = sheet(7.6, 3.0)
        panel = figure.add_subplot()
        width = 0.8 / len(groups)
        for place, (label, values) in enumerate(groups.items()):
            index = arms.index(label)
            there = [category for category in categories if values.get(category)]
            places = [categories.index(category) - 0.4 + width * (place + 0.5) for category in there]
            line = {"color": colour(index), "linewidth": 1.2}
            drawn = panel.boxplot(
                [values[category] for category in there], positions=places, widths=0.8 * width, manage_ticks=False,
                boxprops=line, whiskerprops=line, capprops=line, medianprops={**line, "linewidth": 2.2},
                flierprops={"marker": ".", "markersize": 3, "markeredgecolor": colour(index)},
            )  # fmt: skip
            drawn["boxes"][0].set_label(label)
        panel.set_xticks(range(len(categories)), categories)
        panel.set_ylabel(unit)
        panel.grid(axis="y", color=INK, alpha=0.12, linewidth=0.6)
        legend_below(figure, panel)
        return picture(name, title, caption, figure)


def dots(arms: Arms, groups: dict[str, dict[str, list[float]]], name: str, title: str, caption: str) -> Picture | None:
    """Draws the mean of each category as a dot, one row a category, one mark an arm."""
    categories = list(dict.fromkeys(category for arm in groups.values() for category in arm))
    if not categories:
        return None
    with style(name):
        figure = sheet(7.6, 1.3 + 0.3 * len(categories) + 0.2 * math.ceil(len(groups) / 4))
        panel = figure.add_subplot()
        for place, (label, values) in enumerate(groups.items()):
            index = arms.index(label)
            there = [category for category in categories if values.get(category)]
            means = [float(np.mean(values[category])) for category in there]
            places = [categories.index(one) + 0.5 * (place / max(len(groups) - 1, 1) - 0.5) for one in there]
            panel.plot(means, places, marker(index), color=colour(index), markersize=5, label=label)
        panel.set_yticks(range(len(categories)), categories)
        panel.set_ylim(len(categories) - 0.4, -0.6)
        panel.grid(color=INK, alpha=0.12, linewidth=0.6)
        legend_below(figure, panel)
        return picture(name, title, caption, figure)


_BANDS = {
    "gradients": ("Alignment of tasks by band of singular values", "cosine of the tasks' gradients",
                  "Cosine of the tasks' gradients within each band of singular directions of the layers' updates"),
    "heads": ("Alignment of heads by band of singular values", "overlap of the heads' subspaces",
              "Overlap of the heads' (or tasks' own) singular directions in each band, 1: the same subspace"),
}  # fmt: skip


def bands(arms: Arms, of: Literal["gradients", "heads"]) -> Picture | None:
    """Draws the alignment by band of singular values, one line an arm, mean over seeds."""
    lines = [(one.label, [part for part in mechanism(one, "bands") if part["of"] == of]) for one in arms.trained]
    lines = [(label, parts) for label, parts in lines if parts]
    if not lines:
        return None
    title, unit, caption = _BANDS[of]
    with style(f"bands_{of}"):
        figure = sheet(7.6, 3.0)
        panel = figure.add_subplot()
        most = max(len(part["bands"]) for _, parts in lines for part in parts)
        for label, parts in lines:
            index = arms.index(label)
            mean = np.mean([part["alignment"] for part in parts], axis=0)
            line = LINES[index % len(LINES)]
            panel.plot(
                range(len(mean)), mean, line, marker=marker(index), markersize=4, color=colour(index), label=label
            )
        panel.set_xticks(range(most), [str(number + 1) for number in range(most)])
        panel.set_xlabel("band of singular values, the largest first")
        panel.set_ylabel(unit)
        panel.grid(color=INK, alpha=0.12, linewidth=0.6)
        figure.legend(loc="outside right center")
        return picture(f"bands_{of}", title, f"{caption}; mean over layers and seeds.", figure)


def latents(arms: Arms) -> Picture | None:
    """Draws the t-SNE of one layer's latents, one panel an arm (its first seed), one colour a task."""
    found = [(one.label, mechanism(one, "latents")) for one in arms.trained]
    panels = [(label, parts[0]) for label, parts in found if parts][:_MOST_PANELS]
    if not panels:
        return None
    with style("latents"):
        figure, axes = _grid(len(panels), 2.5)
        tasks = list(dict.fromkeys(task for _, part in panels for task in part["tasks"]))
        for panel, (label, part) in zip(axes, panels, strict=True):
            points, labels = np.array(part["points"], float), np.array(part["labels"])
            for number, task in enumerate(part["tasks"]):
                of_task, index = points[labels == number], tasks.index(task)
                shown = task if panel is axes[0] else None
                panel.plot(*of_task.T, marker(index), color=colour(index), markersize=3, alpha=0.8, label=shown)
            probe = f"probe {100 * part['probe_accuracy']:.0f}% (chance {100 * part['probe_chance']:.0f}%)"
            panel.set_title(f"{_short(label)}\n{probe}", fontsize=8.5)
            panel.set_xticks([])
            panel.set_yticks([])
            panel.spines[:].set_visible(True)
            panel.spines[:].set_alpha(0.25)
        legend_below(figure, axes[0], markerscale=1.6)
        caption = (
            f"t-SNE of the latents of {panels[0][1]['layer']}, first seed of each arm. Its shapes depend on the "
            "method; the number is that of a linear probe that tells the tasks apart: at its chance, no latent does."
        )
        return picture("latents", "Latents by task", caption, figure)


def divergence(arms: Arms) -> Picture | None:
    """Draws the divergence of each pair of tasks as a heat map, one panel an arm, on one scale."""
    found = [(one.label, mechanism(one, "divergence")) for one in arms.trained]
    panels = [
        (label, parts[0]["tasks"], np.mean([np.array(part["kl"]) / part["dimensions"] for part in parts], axis=0))
        for label, parts in found
        if parts
    ]
    caption = (
        "KL divergence of the latents of each pair of tasks on the probe, by dimension, so that ranks compare; mean "
        "over seeds, one scale for all arms."
    )
    return heat_maps(panels[:_MOST_PANELS], "divergence", "Divergence of tasks", caption)


def load(arms: Arms) -> Picture | None:
    """Draws the mean weight of each head of a router by module as a heat map, one panel an arm that routes."""
    panels = []
    for variant in arms.trained:
        parts = mechanism(variant, "routing", "importance")
        if parts:
            panels.append((variant.label, list(parts[0]), np.mean([list(part.values()) for part in parts], axis=0)))
    caption = "Mean weight of each head by type of module; equal weights: the router does not choose."
    return heat_maps(panels[:_MOST_PANELS], "routing_load", "Load of heads", caption, square=False)


def heat_maps(
    panels: Sequence[tuple[str, list[str], Any]], name: str, title: str, caption: str, *, square: bool = True,
    width: float = 2.5, height: float = 2.4,
) -> Picture | None:  # fmt: skip
    """Draws matrices as heat maps on one scale.

    Args:
        panels: a title, the names of the rows, and the values [rows, columns].
        name: of the figure.
        title: of the figure.
        caption: of the figure.
        square: whether the columns have the names of the rows; otherwise they are numbered.
        width: of a panel in inches.
        height: of a panel in inches.
    """
    if not panels:
        return None
    low, high = min(values.min() for *_, values in panels), max(values.max() for *_, values in panels)
    colours = matplotlib.colormaps["viridis"].resampled(16)
    with style(name):
        figure, axes = _grid(len(panels), height, width)
        for panel, (label, rows, values) in zip(axes, panels, strict=True):
            drawn = panel.pcolormesh(values, cmap=colours, vmin=low, vmax=high, edgecolors="face", linewidth=0.2)
            panel.set_title(_short(label), fontsize=8.5)
            first = panel in axes[:: _columns(len(panels))]
            panel.set_yticks(np.arange(len(rows)) + 0.5, rows if first else [""] * len(rows))
            if square:
                panel.set_xticks(np.arange(len(rows)) + 0.5, rows, rotation=45, ha="right")
            else:
                numbers = np.arange(0, values.shape[1], 1 + values.shape[1] // 12)
                panel.set_xticks(numbers + 0.5, [str(number + 1) for number in numbers])
            panel.invert_yaxis()
            if max(values.shape) <= _TEXT_IN_CELLS:
                for (y, x), value in np.ndenumerate(values):
                    red, green, blue, _ = colours((value - low) / (high - low or 1.0))
                    ink = "#000000" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.4 else "#ffffff"
                    panel.text(x + 0.5, y + 0.5, f"{value:.2g}", ha="center", va="center", fontsize=7, color=ink)
        figure.colorbar(drawn, ax=axes, shrink=0.6, pad=0.02)
        return picture(name, title, caption, figure)


def _short(label: str) -> str:
    """Returns a label for a narrow panel: the values of axes on a line of their own."""
    return label.replace(" (", "\n(", 1)


def _columns(panels: int) -> int:
    return min(panels, 3)


def _grid(panels: int, height: float, width: float = 2.5) -> tuple[Any, list[Any]]:
    """Returns a figure with so many panels in rows of three, each of a height and width in inches."""
    columns = _columns(panels)
    rows = math.ceil(panels / columns)
    figure = sheet(max(width * columns, 4.0), height * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False).flatten().tolist()
    for unused in axes[panels:]:
        unused.remove()
    return figure, axes[:panels]
