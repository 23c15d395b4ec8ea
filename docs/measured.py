"""The documents' tables of what was measured, from docs/measurements/*.json: python docs/measured.py [--write].

`align-lora bench --save` writes such a file for a machine. This makes the tables of the page beside it, and those of
docs/performance.md, which are about all machines; --write renews them, and begins the page of a new machine.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from align_ext.bench.restructured import FORMS, LEAST_TURNS, Cell

DOCS = Path(__file__).parent
PERFORMANCE = DOCS / "performance.md"
COSTS = ("lora", "align_lora, kl", "m_lora", "r_lora", "hydra", "PEFT's LoRA", "R-LoRA, loop")
VERDICTS = ("faster", "slower", "neither", "open")
FEW = 4  # the columns of a table; where there are more, they are its rows
Columns = dict[str, dict[str, dict[str, Any]]]


def measured() -> dict[str, dict[str, Any]]:
    """What every file holds, by its name."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((DOCS / "measurements").glob("*.json"))}


def machine(file: dict[str, Any]) -> str:
    """The machine in a few words."""
    about = file["machine"]
    if "gpu" in about:
        return about["gpu"]
    limit = f", limited to {about['vectors'][-1]}" if "ONEDNN_MAX_CPU_ISA" in about else f", {about['vectors'][-1]}"
    return f"{about['processor']}{limit}, {about['threads']} threads"


def linked(name: str, file: dict[str, Any]) -> str:
    """The machine with a link to its page."""
    return f"[{machine(file)}](measurements/{name}.md)"


def number(value: float) -> str:
    """A ratio to three digits."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def three(values: Any) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile; of some machines the median alone is known."""
    low, mid, high = 3 * [values] if isinstance(values, int | float) else values
    return low, mid, high


def quartiles(values: Any) -> str:
    """A median and its quartiles, if they are known."""
    low, mid, high = map(number, three(values))
    return mid if isinstance(values, int | float) else f"{mid} ({low} .. {high})"


def cells(file: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Ours beside restructured forms: (cell, its figures, its verdict).

    By paired turns where the file has them, which is so in all that the benchmark writes; else by the ratios to the
    frozen layer, of which one is above another if their quartiles do not overlap, or if medians alone are known.
    """
    found = []
    tables = file["tables"]
    by_turns = "to_restructured" in str(tables)
    for table, columns in tables.items():
        for column, rows in columns.items():
            tokens = re.match(r"(?:one adapter|several heads).*?(T=\d+)", table)
            name = f"{tokens[1]}, {column}" if tokens else column.removeprefix("restructured")
            name = f"whole step, {column}" if table.startswith("whole step") else name
            for ours, form in FORMS.items():
                row = rows.get(ours, {})
                if "to_restructured" in row:
                    cell = Cell(f"{ours}, {name}", tuple(row["to_restructured"]), row["turns"])
                    found.append((cell.name, quartiles(row["to_restructured"]), cell.verdict))
                elif form in rows and "ratio" in row and not (by_turns and tokens):
                    one, other = row["ratio"], rows[form]["ratio"]
                    figures = f"{quartiles(one)} beside {quartiles(other)}"
                    found.append((f"{ours}, {name}", figures, _verdict(one, other)))
    return found


def _verdict(one: Any, other: Any) -> str:
    (low, _, high), (other_low, _, other_high) = three(one), three(other)
    return "slower" if low > other_high else "faster" if high < other_low else "neither"


def restructured() -> str:
    """The table of the claim: on each machine, in how many cells ours is faster, and where it is not."""
    lines = ["| machine | cells | faster | neither | slower |", "|---|---|---|---|---|"]
    for name, file in measured().items():
        found = cells(file)
        of = {verdict: [f"{c}: {figures}" for c, figures, v in found if v == verdict] for verdict in VERDICTS}
        shown = "; ".join(of["slower"]) or "none"
        few = f", {len(of['open'])} of fewer than {LEAST_TURNS} turns" if of["open"] else ""
        counts = (f"{len(found)}{few}", len(of["faster"]), len(of["neither"]), shown)
        if found:
            lines.append("| " + " | ".join([linked(name, file), *map(str, counts)]) + " |")
    return "\n".join(lines)


def layers() -> str:
    """The table of what a layer takes on each machine, in medians."""
    lines = ["| machine | layer | " + " | ".join(COSTS) + " |", "|---|---|" + "---|" * len(COSTS)]
    for name, file in measured().items():
        by_column: Columns = {}
        for table, columns in file["tables"].items():
            if re.match("(one adapter|several heads), .*T=2048", table):
                for column, rows in columns.items():
                    by_column.setdefault(column, {}).update(rows)
        shown = linked(name, file)
        for column, rows in by_column.items():
            medians = (number(three(rows[cost]["ratio"])[1]) if cost in rows else "" for cost in COSTS)
            lines.append(f"| {shown} | {column} | " + " | ".join(medians) + " |")
            shown = ""
    return "\n".join(lines)


def siblings() -> str:
    """The table of the whole step with siblings as one operator, and with an operator a layer."""
    lines = ["| machine | variant | one operator | an operator a layer |", "|---|---|---|---|"]
    for file in measured().values():
        for table, columns in file["tables"].items():
            for column, rows in columns.items():
                for name, row in rows.items():
                    alone = rows.get(f"{name}, share_inputs=False")
                    if alone:
                        what = f"{name.partition(',')[0]}, {table.split(', ')[1]}, {column}"
                        cells = (machine(file), what, quartiles(row["ratio"]), quartiles(alone["ratio"]))
                        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) if len(lines) > 2 else "No machine's file has this yet."


def page(file: dict[str, Any]) -> str:
    """What a machine's file holds, as text and tables."""
    packages = ", ".join(f"{name} {version}" for name, version in file["packages"].items())
    about = [", ".join(file["machine"].get("vectors", [])), packages, file["date"] or "", file.get("note", "")]
    if "suites" in file:
        seconds = sum(suite["seconds"] for suite in file["suites"].values())
        about.append(f"`align-lora bench --only {','.join(file['suites'])}`, {seconds} s")
    if "ONEDNN_MAX_CPU_ISA" in file["machine"]:
        about.append(f"`ONEDNN_MAX_CPU_ISA={file['machine']['ONEDNN_MAX_CPU_ISA']}`")
    parts = [". ".join(part.rstrip(".") for part in about if part) + "."]
    for table, columns in file["tables"].items():
        parts += [f"**{table}**", _turned(columns) if len(columns) > FEW else _table(columns)]
    return "\n\n".join(parts)


def _cell(row: dict[str, Any]) -> str:
    if "ratio" not in row:
        return f"{row['ms']:g} ms" if "ms" in row else "1"
    beside = f"; {quartiles(row['to_restructured'])}" if "to_restructured" in row else ""
    return quartiles(row["ratio"]) + beside


def _table(columns: Columns) -> str:
    """A row for each variant; a comparison with tokens per second or memory has further columns."""
    more = {"tokens_per_s": "tokens/s", "peak_mib": "peak MiB"}
    known = {c: [key for key in more if any(key in row for row in rows.values())] for c, rows in columns.items()}
    heads = [text for c in columns for text in (c, *(more[key] for key in known[c]))]
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---|" * len(heads)]
    for name in names:
        shown = []
        for column, rows in columns.items():
            row = rows.get(name)
            shown += [_cell(row) if row else "", *(str(row.get(key, "")) if row else "" for key in known[column])]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _turned(columns: Columns) -> str:
    """A row for each comparison, a column for each variant."""
    names = dict.fromkeys(name for rows in columns.values() for name in rows)
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for column, rows in columns.items():
        lines.append(f"| {column} | " + " | ".join(_cell(rows[n]) if n in rows else "" for n in names) + " |")
    return "\n".join(lines)


TABLES = {"restructured": restructured, "layers": layers, "siblings": siblings}


def renewed(text: str, tables: dict[str, str]) -> str:
    """A document with its tables, between `<!-- measured: name -->` and `<!-- end -->`, as the files have them."""
    for name, table in tables.items():
        found = re.compile(rf"(<!-- measured: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text = found.sub(lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text)
    return text


def documents() -> dict[Path, str]:
    """Every document with such tables, as it should be; a machine without a page begins one."""
    result = {PERFORMANCE: renewed(PERFORMANCE.read_text(), {name: table() for name, table in TABLES.items()})}
    for name, file in measured().items():
        path = DOCS / f"measurements/{name}.md"
        new = f"# {machine(file)}\n\n<!-- measured: {name} -->\n<!-- end -->\n"
        result[path] = renewed(path.read_text() if path.exists() else new, {name: page(file)})
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="renew docs/performance.md and the pages of the machines")
    if parser.parse_args().write:
        for document, text in documents().items():
            document.write_text(text)
    else:
        print("\n\n".join(table() for table in TABLES.values()))
