"""The templates of the pages: layout.html.jinja, what all of them share, and parts.html.jinja, their parts."""

from pathlib import Path
from typing import Any

import jinja2

from align_ext.report.formats import Column, cell, markdown, to_markdown


def templates() -> jinja2.Environment:
    """Returns the environment of all templates in this folder; what is no markup is escaped in HTML."""
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True, autoescape=jinja2.select_autoescape(["html.jinja"]),
    )  # fmt: skip
    pages.filters |= {"markdown": markdown, "to_markdown": to_markdown}
    pages.globals |= {"text_of": cell, "sort_value": _sort_value}
    return pages


def _sort_value(row: dict[str, Any], column: Column) -> str:
    """Returns what a column is sorted by: a number, or the text in lower case."""
    value = row.get(column.key)
    if value is None:
        return ""
    if isinstance(value, (int, float)):
        return f"{float(value):.10g}"
    return str(value).lower()
