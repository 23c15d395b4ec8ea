"""Figures as SVG text: the same bytes each time, legible in light, in the dark and in print, and as part of a page.

Everything neutral is drawn in INK, a colour that nothing else has, which becomes currentColor: the colour of the text
around the figure. The colours of the data have a contrast of 3 and more with white and with black paper.
"""

import io
import re
import warnings
from dataclasses import dataclass
from html import escape
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#010203"
COLOURS = ("#2f7fc1", "#cf6420", "#2e9463", "#c2477f", "#8a68c9", "#9a7b1f", "#c9453d", "#2f8c9b", "#7d7f85")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h")
LINES = ("-", "--", "-.", ":")
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none", "font.family": ["DejaVu Sans"], "font.size": 9.0, "axes.titlesize": 9.5,
    "axes.labelsize": 9.0, "legend.fontsize": 8.5, "legend.frameon": False, "axes.facecolor": "none",
    "figure.facecolor": "none", "savefig.facecolor": "none",
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.7,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip
_FONTS = "font-family: 'DejaVu Sans', Verdana, sans-serif"  # of one width, so that nothing overlaps with either
_ALONE = "<style>svg { color: #1b1b1b } @media (prefers-color-scheme: dark) { svg { color: #e4e4e4 } }</style>"


@dataclass(frozen=True)
class Picture:
    """A figure of a report.

    Attributes:
        name: of its file.
        title: what it shows, in a few words.
        caption: below it; also what a screen reader reads.
        svg: the element, for a page.
        width: in pixels, as it is meant; smaller than 0.85 of it, its text is too small to read.
    """

    name: str
    title: str
    caption: str
    svg: str
    width: int

    @property
    def file(self) -> str:
        """The content of its file: the element with the colours of light and dark paper."""
        return self.svg.replace("</desc>", f"</desc>{_ALONE}", 1) + "\n"


def sheet(width: float, height: float) -> Figure:
    """Returns an empty figure, in inches; use within `style`."""
    return Figure(figsize=(width, height), layout="constrained")


def style(name: str) -> Any:
    """Returns a context in which matplotlib draws in our style, whatever the user's own settings are.

    Args:
        name: of the figure; ids in the SVG are derived from it.
    """
    defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    return matplotlib.rc_context({**defaults, **_SETTINGS, "svg.hashsalt": name})


def picture(name: str, title: str, caption: str, figure: Figure) -> Picture:
    """Returns a drawn figure as an SVG element with a title and a description, whose ids no other figure has."""
    buffer = io.StringIO()
    with warnings.catch_warnings():  # the reader's fonts have what ours lacks: text stays text
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style type=\"text/css\">.*?</style>", "", text, flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    text = re.sub(r"(font: (?:[a-z0-9]+ )*[0-9.]+px) 'DejaVu Sans'", r"\1 'DejaVu Sans', Verdana, sans-serif", text)
    head = f'role="img" aria-labelledby="{name}-title {name}-desc" stroke-linejoin="round" version'
    text = re.sub(r"\bversion", head, text, count=1)
    about = f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(caption)}</desc>'
    end = text.index(">") + 1
    return Picture(name, title, caption, f"{text[:end]}{about}{text[end:].rstrip()}", round(96 * figure.get_figwidth()))


def legend_below(figure: Figure, panel: Any, **options: Any) -> None:
    """Puts a panel's legend below a figure, in as many columns as its labels leave room for."""
    handles, labels = panel.get_legend_handles_labels()
    letters = figure.get_figwidth() * 72 / (0.6 * _SETTINGS["legend.fontsize"])
    columns = int(letters / (max(map(len, labels), default=0) + 9))  # 9 for the mark and the space between columns
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(columns, 5)), **options)


def colour(index: int) -> str:
    """Returns the colour of the index-th arm or task."""
    return COLOURS[index % len(COLOURS)]


def marker(index: int) -> str:
    """Returns the marker of the index-th arm or task, so that colour is never the only difference."""
    return MARKERS[(index + index // len(COLOURS)) % len(MARKERS)]
