"""The documents' tables of architectures and of rows, from the code: python docs/tables.py [--write README.md]."""

import argparse
import re
from pathlib import Path
from typing import Any

from torch import nn

from align_ext import AlignLoraConfig
from align_ext.adapters import adapter_class
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.architectures import ARCHITECTURES
from align_ext.data.rows import ROWS
from align_ext.model.cost import trained_parameters
from align_ext.study.published import meta_model, published

# What is one change in an option, and yet an architecture of its own.
VARIANTS: dict[str, dict[str, Any]] = {"hydra": {"router": None}}
# mtLoRA's ablation (2603.01526): each row differs from the one above, or from "block", by what its name says.
_SIZES = {"r": 16, "lora_alpha": 64, "num_heads": 16}
_ROUTED = {"architecture": "hydra", "balance": "cv2", **_SIZES}
_BLOCK = {**_ROUTED, "target_blocks": ("mlp",)}
ABLATION: dict[str, dict[str, Any]] = {
    "HydraLoRA": {**_ROUTED, "target_modules": ("q_proj", "v_proj")},
    "+ block": _BLOCK,
    "+ block + spectral": {**_BLOCK, "spectral": "paper"},
    "+ block + fine-grained": {**_BLOCK, "routing_groups": 2},
    "all: mtLoRA": {"architecture": "mtlora", **_SIZES},
}


def configs() -> list[tuple[str, AlignLoraConfig]]:
    """Every architecture, and the variants, by the words that choose it."""
    rows = []
    for name in ARCHITECTURES:
        for options in ({}, VARIANTS[name]) if name in VARIANTS else ({},):
            words = " ".join([name, *(f"{key}={value}" for key, value in options.items())])
            rows.append((words, AlignLoraConfig(architecture=name, num_tasks=3, **options)))
    return rows


def merges(config: AlignLoraConfig) -> str:
    """Whether the adapters of a config merge into the base weights: as they say themselves."""
    if config.target_blocks:
        return "no"
    layer = AdaptedLinear(nn.Linear(8, 8), adapter_class(config)(config, 8, 8))
    if layer.unmergeable_reason() is None:
        return "yes"
    return "a task" if config.row.by_task else "no"


def architectures() -> str:
    """The table of architectures: what each adds to W x, what it costs, whether it merges, where it is from."""
    lines = [
        "| architecture | adds to W x | trained a layer | merges, exports to PEFT | paper |",
        "|---|---|---|---|---|",
    ]
    for words, config in configs():
        row, aligned = config.row, " (tasks aligned)" if config.align else ""
        plain, _, of_aligned = row.paper.partition("; aligned: ")
        paper = _linked((config.align and of_aligned) or plain)
        cells = (f"`{words}`", f"{row.formula}{aligned}", row.parameters, merges(config), paper)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablation() -> str:
    """The table of mtLoRA's ablation as options of `align-lora train`, with what they train of LLaMA-2-7B."""
    lines = ["| row | trained of LLaMA-2-7B | `align-lora train` |", "|---|---|---|"]
    model = meta_model("LLaMA-2-7B")
    for row, options in ABLATION.items():
        flags = (f"--{name.replace('_', '-')} {_word(value)}" for name, value in options.items())
        trained = trained_parameters(AlignLoraConfig(**options), model)
        lines.append(f"| {row} | {trained / 1e6:.1f} M | `{' '.join(flags)}` |")
    return "\n".join(lines)


def published_counts() -> str:
    """The table of the papers' numbers beside what is counted here."""
    lines = ["| paper | what | model | settings | printed | counted | the same | note |", "|---|" + 7 * "---|"]
    for row in published():
        cells = (
            _linked(row.paper) + f", {row.table}", row.method, row.model, row.settings, f"{row.printed} {row.unit}",
            row.rounded, "yes" if row.agrees else "**no**", row.note,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _word(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


def _linked(paper: str) -> str:
    return re.sub(r"\d{4}\.\d{5}", lambda found: f"[{found[0]}](https://arxiv.org/abs/{found[0]})", paper)


def rows() -> str:
    """The table of the columns that rows of data may have."""
    lines = ["| column | is |", "|---|---|"]
    for columns, meaning in ROWS:
        names = re.sub(r"\b(?!or\b)\w+", lambda found: f"`{found[0]}`", columns)
        lines.append(f"| {names} | {meaning} |")
    return "\n".join(lines)


TABLES = {"architectures": architectures, "ablation": ablation, "published": published_counts, "rows": rows}


def renewed(text: str) -> str:
    """A document with its tables, between `<!-- name -->` and `<!-- end -->`, as the code has them now."""
    for name, table in TABLES.items():
        text = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL
        )
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, help="renew the tables of this document")
    arguments = parser.parse_args()
    if arguments.write is None:
        print("\n\n".join(table() for table in TABLES.values()))
    else:
        arguments.write.write_text(renewed(arguments.write.read_text()))
