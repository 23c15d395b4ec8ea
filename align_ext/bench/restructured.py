"""Whether this package's layers are slower anywhere than the same mathematics restructured in plain PyTorch.

A cell is an architecture that has a restructured form, a number of tokens, a layer and a dtype. In each round ours and
the restructured form take their turns one after the other, so that a clock that changes meets both; the quartiles are
those of the ratios within a round. Three turns of four decide: ours is slower where even the lower quartile is above 1,
faster where even the upper one is below 1, and between them noise explains what was seen. A tie of eight turns looks
slower about once in ten cells, of twenty once in a hundred.
"""

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch

from align_ext.bench.baselines import LORA, SEVERAL, Make
from align_ext.bench.layers import HEADS, SINGLE, ours, takes_too_long, variants
from align_ext.bench.setting import Case, Setting, name_of
from align_ext.bench.timing import ROW_MS, Comparison, visits
from align_ext.system.terminal import PrintLine

FORMS = {
    "lora": "LoRA, restructured", "m_lora": "M-LoRA, restructured", "r_lora": "R-LoRA, restructured",
    "hydra": "HydraLoRA, restructured",
}  # fmt: skip
LEAST_TURNS = 8
LEAST_ROUNDS = 4  # of a visit, so that two of them are enough


@dataclass(frozen=True)
class Cell:
    """Ours beside its restructured form: the quartiles of its ratios, one of each round."""

    name: str
    quartiles: tuple[float, float, float]
    turns: int

    @property
    def verdict(self) -> Literal["faster", "slower", "neither", "open"]:
        """What the turns say of ours; "open": they are too few."""
        low, _, high = self.quartiles
        if self.turns < LEAST_TURNS:
            return "open"
        return "slower" if low > 1 else "faster" if high < 1 else "neither"

    def __str__(self) -> str:
        low, mid, high = self.quartiles
        return f"{self.name}: {mid:.2f} ({low:.2f} .. {high:.2f})"


def restructured(setting: Setting) -> Iterator[Case]:
    """Measures lora, m_lora, r_lora and hydra beside their restructured forms, for several numbers of tokens."""
    sizes = setting.sizes
    for tokens, shape, dtype in itertools.product(setting.batches, setting.shapes, setting.dtypes):
        yield Case(
            f"restructured, forward + backward, r={sizes.rank}, N={sizes.heads}, p={sizes.dropout_p:g}",
            f"T={tokens}, {shape[0]} -> {shape[1]}, {name_of(dtype)}", partial(_cell, setting, tokens, shape, dtype),
        )  # fmt: skip


def _cell(
    setting: Setting, tokens: int, shape: tuple[int, int], dtype: torch.dtype, _: PrintLine
) -> Iterator[Comparison]:
    if takes_too_long(setting, 2 * len(FORMS), tokens, shape, dtype):
        return
    own, others = SINGLE | HEADS, LORA | SEVERAL
    makes: dict[str, Make] = {}
    for name, form in FORMS.items():
        makes |= {name: ours(own[name]), form: others[form]}
    calls = variants(makes, replace(setting.sizes, tokens=tokens), shape, dtype, setting.device)
    rounds, least = setting.rounds, min(LEAST_ROUNDS, setting.rounds)
    for result in visits(calls, rounds, setting.device, row_ms=ROW_MS, least=least, seconds=setting.share):
        result.restructured = FORMS
        yield result


def cells(results: Mapping[str, Comparison]) -> list[Cell]:
    """Returns the cells of the suite's comparisons, by their titles; other comparisons have none."""
    return [
        Cell(f"{name}, {title.partition(': ')[2]}", comparison.to_restructured(name), len(comparison.times_ms[name]))
        for title, comparison in results.items()
        for name in comparison.restructured
    ]


def holds(measured: list[Cell], left_out: list[str]) -> bool:
    """Whether ours is slower in no cell, as far as turns tell, and nothing was left out."""
    return not left_out and all(cell.verdict in ("faster", "neither") for cell in measured)


def summary(measured: list[Cell], left_out: list[str]) -> list[str]:
    """Says in lines in which cells ours is slower than the restructured form; an empty list without cells.

    Args:
        measured: the cells.
        left_out: the comparisons that a slow machine left out.
    """
    if not measured:
        return []
    of = {verdict: [c for c in measured if c.verdict == verdict] for verdict in ("faster", "slower", "neither", "open")}
    if len(of["faster"]) == len(measured) and not left_out:
        return [f"In every cell, {len(measured)} of them, ours is faster than the same mathematics restructured."]
    lines = [f"Of {len(measured)} cells ours is faster than the same mathematics restructured in {len(of['faster'])}."]
    for verdict, words in {
        "slower": "It is slower beyond what noise explains in",
        "neither": "Neither beyond what noise explains in",
        "open": f"Measured in fewer than {LEAST_TURNS} turns (--only restructured leaves more time for each):",
    }.items():
        if of[verdict] or verdict == "slower":
            lines += [f"{words} {len(of[verdict]) or 'none'}", *(f"  {cell}" for cell in of[verdict])]
    return lines
