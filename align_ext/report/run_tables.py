"""Tables of what was measured once a run and not once a row: forgetting, cost, the mechanism."""

from collections.abc import Callable
from typing import Any

import numpy as np

from align_ext.report.chosen import Arms, Variant
from align_ext.report.formats import Column, Table
from align_ext.report.results import Cell
from align_ext.report.tables import arm_columns, mean_and_error


def of_cells(variant: Variant, read: Callable[[Cell], Any]) -> list[float]:
    """Returns a number of each of a variant's cells that has it, in the order of the seeds."""
    values = [_read(read, cell) for cell in variant.cells.values()]
    return [float(value) for value in values if value is not None]


def _read(read: Callable[[Cell], Any], cell: Cell) -> Any:
    try:
        return read(cell)
    except (KeyError, TypeError, IndexError):  # an optional part that this cell lacks
        return None


def forgetting_table(arms: Arms) -> Table | None:
    """Returns the loss on plain text of every arm, and what was added to that of the base and of the baseline."""
    base = of_cells(arms.base, _forgetting) if arms.base else []
    rows = []
    for variant in arms.variants.values():
        mean, error = mean_and_error(of_cells(variant, _forgetting))
        row = {**arm_columns(arms, variant), "loss": mean, "error": error}
        if base and mean is not None and variant is not arms.base:
            row["added"] = mean - base[0]
        if other := arms.baseline(variant):
            difference, spread = mean_and_error(_by_seed(variant, other, _forgetting))
            row |= {"difference": difference, "difference_error": spread}
        rows.append(row)
    if all(row["loss"] is None for row in rows):
        return None
    columns = [
        Column("arm", "arm"), Column("loss", "loss on plain text", "nats", error="error"),
        Column("added", "added to the base", "nats", True),
        Column("difference", f"minus {arms.results.baseline}", "nats", True, error="difference_error"),
        Column("seeds", "seeds", "count"),
    ]  # fmt: skip
    caption = (
        "Loss on plain text that no task holds, in nats a token, lower is better; \N{PLUS-MINUS SIGN} standard error "
        "over seeds."
    )
    return Table("forgetting", "Loss on plain text", caption, columns, rows)


def _forgetting(cell: Cell) -> Any:
    return cell.content["forgetting"]["loss"]


def _by_seed(variant: Variant, other: Variant, read: Callable[[Cell], Any]) -> list[float]:
    pairs = [(_read(read, cell), _read(read, other.cells[s])) for s, cell in variant.cells.items() if s in other.cells]
    return [one - two for one, two in pairs if one is not None and two is not None]


def step_ratio(variant: Variant, other: Variant) -> tuple[float, float, float] | None:
    """Returns the time of a step as a ratio to another arm's median: lower quartile, median, upper quartile.

    Only cells of one seed, one machine and as many threads are compared; of several such pairs the median is taken.
    """
    ratios = []
    for seed, cell in variant.cells.items():
        base = other.cells.get(seed)
        one, two = cell.cost or {}, (base.cost if base else None) or {}
        if base and "step_seconds" in one and "step_seconds" in two and cell.place == base.place:
            ratios.append([value / two["step_seconds"][1] for value in one["step_seconds"]])
    if not ratios:
        return None
    low, mid, high = np.median(ratios, axis=0).tolist()
    return low, mid, high


def cost_table(arms: Arms) -> Table | None:
    """Returns what each arm costs: time, memory, parameters, floating-point operations, merging, decoding."""
    rows = []
    for variant in arms.trained:
        about, row = arms.results.arms[variant.arm], arm_columns(arms, variant)
        baseline = arms.baseline(variant) or variant
        if ratio := step_ratio(variant, baseline):
            row |= dict(zip(("ratio_low", "ratio", "ratio_high"), ratio, strict=True))
        for name, read in _COSTS.items():
            row[name] = mean_and_error(of_cells(variant, read))[0]
        flops = about["flops_per_token"]
        row |= {"flops": flops["adapters"] / flops["base"] if flops.get("base") else None, "merges": about["merges"]}
        rows.append(row)
    columns = [
        Column("arm", "arm"), Column("ratio", "step time [quartiles]", "ratio", between=("ratio_low", "ratio_high")),
        Column("tokens", "tokens/s", "count"), Column("memory", "peak MiB", "count"),
        Column("parameters", "parameters", "count"), Column("percent", "% of base", "percent"),
        Column("flops", "FLOPs, % of base", "points"), Column("merges", "merges", "yes"),
        Column("decode", "decode, ms a token", "number"), Column("merged", "merged, ms a token", "number"),
        Column("train", "training, s", "count"),
    ]  # fmt: skip
    kept = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    caption = (
        f"Step time is the ratio to the median step of {arms.results.baseline} with the same seed on the same machine. "
        "Measured, so that it differs between runs; all else in this report does not."
    )
    return Table("cost", "Cost", caption, kept, rows) if rows else None


_COSTS: dict[str, Callable[[Cell], Any]] = {
    "tokens": lambda cell: cell.cost["tokens_per_second"],  # type: ignore[index]
    "memory": lambda cell: cell.cost["peak_memory_mib"],  # type: ignore[index]
    "train": lambda cell: cell.cost["seconds"]["train"],  # type: ignore[index]
    "decode": lambda cell: cell.cost["decode_ms"]["adapter"],  # type: ignore[index]
    "merged": lambda cell: cell.cost["decode_ms"]["merged"],  # type: ignore[index]
}


def mechanism_table(arms: Arms) -> Table | None:
    """Returns the alignment of every arm on the one probe, and what its latents tell of the task."""
    rows = []
    for variant in arms.trained:
        row = arm_columns(arms, variant)
        for name, read in _MECHANISM.items():
            row[name], row[f"{name}_error"] = mean_and_error(of_cells(variant, read))
        rows.append(row)
    kinds = {
        "pairs": "two",
        "weight": "number",
        "probe": "points",
        "chance": "points",
        "silhouette": "two",
        "loss": "nats",
    }
    columns = [
        Column(name, title, kinds.get(name, "number"), error=None if name in ("chance", "weight") else f"{name}_error")
        for name, title in _TITLES.items()
        if any(row[name] is not None for row in rows)
    ]
    caption = (
        "KL and MMD between the tasks' latents on one fixed probe, for the arms without alignment too; the pairs of "
        "tasks that a batch aligned; the accuracy of a linear probe that tells tasks apart. \N{PLUS-MINUS SIGN} "
        "standard error over seeds."
    )
    return (
        Table("mechanism", "Alignment on one probe", caption, [Column("arm", "arm"), *columns], rows)
        if columns
        else None
    )


_MECHANISM: dict[str, Callable[[Cell], Any]] = {
    "kl": lambda cell: cell.content["alignment"]["kl"],
    "mmd": lambda cell: cell.content["alignment"]["mmd"],
    "weight": lambda cell: cell.content["align_weight"],
    "pairs": lambda cell: cell.content["pairs_per_batch"],
    "loss": lambda cell: cell.content["losses"]["last"],
    "probe": lambda cell: cell.content["mechanism"]["latents"]["probe_accuracy"],
    "chance": lambda cell: cell.content["mechanism"]["latents"]["probe_chance"],
    "silhouette": lambda cell: cell.content["mechanism"]["latents"]["silhouette"],
}
_TITLES = {
    "kl": "KL", "mmd": "MMD", "weight": "weight", "pairs": "pairs a batch", "loss": "training loss",
    "probe": "probe, %", "chance": "its chance, %", "silhouette": "silhouette",
}  # fmt: skip


def mechanism(variant: Variant, *path: str) -> list[Any]:
    """Returns one part of the mechanism of each cell that has it, by its path of keys."""
    found = []
    for cell in variant.cells.values():
        part: Any = cell.content.get("mechanism")
        for key in path:
            part = part.get(key) if isinstance(part, dict) else None
        found.append(part)
    return [part for part in found if part is not None]


def by_category(arms: Arms, *path: str) -> dict[str, dict[str, list[float]]]:
    """Returns {arm: {category: values}} of a part of the mechanism that has values by category, all seeds together."""
    found: dict[str, dict[str, list[float]]] = {}
    for variant in arms.trained:
        for part in mechanism(variant, *path):
            for category, values in part.items():
                into = found.setdefault(variant.label, {}).setdefault(category, [])
                into.extend(values if isinstance(values, list) else [values])
    return found
