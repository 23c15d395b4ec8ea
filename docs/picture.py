"""The README's picture, of figures in docs/measurements: python docs/picture.py [--write]."""

import argparse
import json
from pathlib import Path

DOCS = Path(__file__).parent
PICTURE = DOCS / "layer_time.svg"
MEASURED = DOCS / "measurements/x86-64-amx-2-threads.json"
COLUMN = "2048 -> 5504, bfloat16"
BARS = {  # the name in the picture -> the variant that was measured, and whether it is ours
    "LoRA, this package": ("lora", True),
    "Align-LoRA with its loss, this package": ("align_lora, kl", True),
    "LoRA, PEFT": ("PEFT's LoRA", False),
    "R-LoRA, 5 heads, this package": ("r_lora", True),
    "R-LoRA, 5 heads, loop in PyTorch": ("R-LoRA, loop", False),
    "HydraLoRA, 5 heads, this package": ("hydra", True),
    "HydraLoRA, 5 heads, loop in PyTorch": ("HydraLoRA, loop", False),
}
LEFT, SCALE, ROW, TOP = 270, 52, 24, 62  # pixels: where bars begin, of a frozen layer's time, between bars
LIGHT = {  # attributes, which every viewer understands
    "panel": 'fill="#ffffff" stroke="#d0d7de"',
    "line": 'stroke="#8c959f" stroke-dasharray="3 3"',
    "text": 'font-family="sans-serif" font-size="13" fill="#1f2328"',
    "small": 'font-family="sans-serif" font-size="12" fill="#59636e"',
    "ours": 'fill="#0969da"',
    "others": 'fill="#9a6700"',
}
DARK = """@media (prefers-color-scheme: dark) {
  .panel { fill: #0d1117; stroke: #3d444d } .line { stroke: #9198a1 } .text { fill: #f0f6fc } .small { fill: #9198a1 }
  .ours { fill: #4493f8 } .others { fill: #d29922 }
}"""


def medians() -> dict[str, float]:
    """The median of each bar."""
    tables = json.loads(MEASURED.read_text())["tables"]
    rows = {name: row for columns in tables.values() for name, row in columns.get(COLUMN, {}).items()}
    return {name: rows[row]["ratio"][1] for name, (row, _) in BARS.items()}


def look(kind: str) -> str:
    """The attributes of an element: its colours, and the class by which dark surroundings give it others."""
    return f'class="{kind}" {LIGHT[kind]}'


def picture() -> str:
    """A bar chart as SVG, with colours for light and for dark surroundings on a panel of its own."""
    values = medians()
    width, height = LEFT + int(SCALE * max(values.values())) + 60, TOP + ROW * len(values) + 34
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img" aria-labelledby="title">',
        '<title id="title">Time of one adapted layer divided by that of the frozen layer, on a CPU</title>',
        f"<style>{DARK}</style>",
        f'<rect {look("panel")} x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>',
        f'<text {look("text")} x="16" y="26">Time of one adapted layer on a CPU, forward and backward: times the '
        "frozen layer</text>",
        f'<text {look("small")} x="16" y="45">2048 → 5504, 2048 tokens, rank 8, bfloat16, two threads of an x86-64 '
        "processor with AMX; medians</text>",
    ]
    for i, (name, value) in enumerate(values.items()):
        y = TOP + ROW * i
        kind = "ours" if BARS[name][1] else "others"
        lines += [
            f'<text {look("text")} x="{LEFT - 10}" y="{y + 13}" text-anchor="end">{name}</text>',
            f'<rect {look(kind)} x="{LEFT}" y="{y}" width="{SCALE * value:.0f}" height="17" rx="2"/>',
            f'<text {look("text")} x="{LEFT + SCALE * value + 7:.0f}" y="{y + 13}">{value:.2f}</text>',
        ]
    bottom = TOP + ROW * len(values)
    lines += [
        f'<path {look("line")} d="M {LEFT + SCALE} {TOP - 4} V {bottom}"/>',
        f'<text {look("small")} x="{LEFT + SCALE}" y="{bottom + 17}" text-anchor="middle">1: the frozen layer</text>',
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write docs/{PICTURE.name}")
    if parser.parse_args().write:
        PICTURE.write_text(picture())
    else:
        print(picture(), end="")
