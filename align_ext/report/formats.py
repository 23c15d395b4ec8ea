"""A table as plain data, and its forms: text of a value, CSV, LaTeX, Markdown."""

import csv
import io
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

MINUS = "\N{MINUS SIGN}"
NOTHING = "\N{EN DASH}"
_DECIMALS = {"nats": 3, "points": 1, "share": 0, "ratio": 2, "percent": 2, "two": 2}
_SCALE = {"points": 100.0, "share": 100.0}
_AFTER = {"share": " %", "ratio": "\N{MULTIPLICATION SIGN}"}
_TEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": "$<$", ">": "$>$", MINUS: "$-$", NOTHING: "--",
    "\N{PLUS-MINUS SIGN}": r"$\pm$", "\N{MULTIPLICATION SIGN}": r"$\times$",
    "\u201c": "``", "\u201d": "''", "\N{INFINITY}": r"$\infty$",
}  # fmt: skip


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of the value in a row, and the name in the CSV.
        title: its head.
        kind: "text", "nats" (0.012), "points" (a fraction as percent, 61.2), "share" (a fraction, 61 %), "percent",
            "ratio", "p", "count", "number" (3 digits), "two" (2 decimals), "yes".
        signed: whether positive numbers get a plus.
        error: the key of what stands behind a plus-minus.
        between: the keys of what stands in brackets: low and high; with the key "" they stand alone.
    """

    key: str
    title: str
    kind: str = "text"
    signed: bool = False
    error: str | None = None
    between: tuple[str, str] | None = None


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: of its files.
        title: above it.
        caption: what stands in it, in whole sentences.
        columns: from left to right.
        rows: the values by key; "bold" holds the keys of what is printed bold, "role" what the row is: "baseline",
            "control", "base" or "".
        folded: whether the HTML shows it only when asked.
    """

    name: str
    title: str
    caption: str
    columns: list[Column]
    rows: list[dict[str, Any]]
    folded: bool = field(default=False)


def number(value: Any, kind: str, signed: bool = False) -> str:
    """Returns a value as text; see Column.kind. What is missing is a dash."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if kind == "text":
        return str(value)
    if kind == "yes":
        return "yes" if value else "no"
    if isinstance(value, float) and math.isinf(value):
        return f"{MINUS if value < 0 else ''}\N{INFINITY}"
    if kind == "p":
        text = "<0.001" if value < 0.001 else f"{value:.3f}"
    elif kind == "count":
        text = f"{value:,.0f}"
    elif kind == "number":
        text = f"{value:.3g}"
    else:
        decimals = _DECIMALS[kind]
        text = f"{round(value * _SCALE.get(kind, 1.0), decimals) + 0.0:.{decimals}f}"
    if signed and float(text.replace(",", "")) > 0:
        text = f"+{text}"
    return text.replace("-", MINUS) + _AFTER.get(kind, "")


def cell(row: dict[str, Any], column: Column) -> str:
    """Returns the text of one cell: the value, its error behind a plus-minus, its interval in brackets."""
    text = number(row.get(column.key), column.kind, column.signed) if column.key else NOTHING
    if column.error and row.get(column.error) is not None:
        error = f"{row[column.error]:.2g}" if column.kind == "number" else number(row[column.error], column.kind)
        text += f" \N{PLUS-MINUS SIGN} {error}"
    if column.between and row.get(column.between[0]) is not None:
        low, high = (number(row[key], column.kind, column.signed) for key in column.between)
        text = f"{text} [{low}, {high}]" if column.key else f"[{low}, {high}]"
    return text


def to_csv(table: Table) -> str:
    """Returns a table as CSV: one line of names, then all numbers with 10 digits; missing ones are empty."""
    keys = ["role"] if any(row.get("role") for row in table.rows) else []
    for column in table.columns:
        keys += filter(None, [column.key, column.error, *(column.between or ())])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(keys)
    for row in table.rows:
        writer.writerow([_plain(row.get(key)) for key in keys])
    return text.getvalue()


def to_tex(table: Table) -> str:
    """Returns a table as a LaTeX tabular with the rules of the package booktabs."""
    shape = "".join("l" if column.kind == "text" else "r" for column in table.columns)
    lines = [f"% {' '.join(table.title.split())}; needs \\usepackage{{booktabs}}", f"\\begin{{tabular}}{{{shape}}}"]
    lines += ["\\toprule", " & ".join(tex(column.title) for column in table.columns) + r" \\", "\\midrule"]
    for row in table.rows:
        lines.append(" & ".join(_cells(row, table.columns, tex, lambda text: f"\\textbf{{{text}}}")) + r" \\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", ""])


def to_markdown(table: Table) -> str:
    """Returns a table in the Markdown of GitHub."""
    rule = ["---" if column.kind == "text" else "---:" for column in table.columns]
    lines = [[markdown(column.title) for column in table.columns], rule]
    lines += [_cells(row, table.columns, markdown, lambda text: f"**{text}**") for row in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tex(text: str) -> str:
    """Returns text for LaTeX: what LaTeX would read as a command is escaped."""
    return "".join(_TEX.get(character, character) for character in " ".join(text.split()))


def markdown(text: str) -> str:
    """Returns text for Markdown: what would be read as markup is escaped."""
    return re.sub(r"([\\`*<|]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def _cells(
    row: dict[str, Any], columns: list[Column], escape: Callable[[str], str], bold: Callable[[str], str]
) -> list[str]:
    texts = [escape(cell(row, column)) for column in columns]
    strong = row.get("bold", ())
    return [bold(text) if column.key in strong else text for text, column in zip(texts, columns, strict=True)]


def _plain(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.10g}" if isinstance(value, float) else str(value)
