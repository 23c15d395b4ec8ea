"""What each CUDA kernel of an adapted layer would take on a GPU if only the hardware's limits held it up.

    time = max(bytes / memory, work of each unit of the busiest multiprocessor, blocks one after the other) + launch

A paper model: nothing is measured. kernel_work.py has the bytes and the work, gpus.py the hardware.

Usage: python benchmarks/roofline.py [--gemm 0.65] [--hbm 0.9] [--write docs/cuda.md]

Prints the tables, or rewrites those between the markers of a file.
"""

import argparse
import math
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tile_work
from eager_work import loop, sums_of_dx
from gpus import GPUS, Gpu
from kernel_work import Kernels, Layer, Work, grouped_lora, heads, sibling_lora
from page import show

BEGIN, END = "<!-- roofline: begin -->", "<!-- roofline: end -->"
LAYERS = [(3072, 8192), (2048, 5504)]  # of MLPs; 3072 -> 8192 is a 3B model's
OURS: dict[str, tuple[Kernels, dict[str, Any]]] = {
    "lora, align_lora": (grouped_lora, {}),
    "m_lora": (heads, {"heads": 5, "site": "latent", "offset_rank": 8}),
    "r_lora": (heads, {"heads": 5, "site": "latent", "offset_rank": 8, "router": True}),
    "hydra": (heads, {"heads": 5, "router": True}),
    "hydra, input_per_head": (heads, {"heads": 5, "router": True, "site": "input_per_head"}),
}
SIDE_BY_SIDE: list[tuple[str, tuple[int, int]]] = [
    ("lora, align_lora", (3072, 8192)),
    ("lora, align_lora", (8192, 3072)),
    ("lora, align_lora", (4096, 4096)),
    ("hydra, input_per_head", (3072, 8192)),
]
SIBLINGS = [  # modules whose layers read the same x
    ("q, k, v", 4096, (4096, 4096, 4096)),
    ("q, k, v of grouped queries", 4096, (4096, 1024, 1024)),
    ("gate, up", 4096, (11008, 11008)),
]
OTHERS: dict[str, tuple[Kernels, dict[str, Any]]] = {
    "PEFT's LoRA": (loop, {}),
    "M-LoRA, loop": (loop, {"heads": 5, "site": "latent"}),
    "R-LoRA, loop": (loop, {"heads": 5, "site": "latent", "router": True}),
    "HydraLoRA, loop": (loop, {"heads": 5, "router": True}),
}


def markdown(*rows: Iterable[str]) -> str:
    """A table; the first row is its head."""
    first, *others = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([first, "|---" * (first.count("|") - 1) + "|", *others])


def digits(value: float) -> str:
    """Two of them, which is what the model is good for."""
    return f"{round(value, 1 - math.floor(math.log10(value))) if value >= 1 else round(value):.0f}"


def microseconds(seconds: float) -> str:
    """With two digits."""
    return digits(1e6 * seconds)


def kernel_table(works: list[Work], gpu: Gpu) -> str:
    """A row a kernel: what each limit alone would take; the longest; memory and the longest other in turn."""
    names = ["memory", "issue slots", "integers", "products", "shared memory", "one block"]
    columns = []
    for work in works:
        limits = work.limits(gpu)
        memory = limits["memory"]
        in_turn = memory + max(seconds for name, seconds in limits.items() if name != "memory") + gpu.launch
        floor = work.floor / (gpu.hbm * gpu.memory)
        columns.append([work.bytes / 1e12, *(limits.get(name, 0) for name in names), work.seconds(gpu), in_turn, floor])
    columns.append([sum(values) for values in zip(*columns, strict=True)])
    rows = [
        [name, *map(microseconds, row)] for name, row in zip([*(w.name for w in works), "all"], columns, strict=True)
    ]
    return markdown(["lora, µs", "MB", *names, "overlapping", "in turn", "floor"], *rows)


def tile_table(arch: int) -> str:
    """A row a loop and part in bfloat16, a column a rank."""
    version, table = tile_work.read()
    ranks = [16, 32, 64]
    rows = []
    for name, part in dict.fromkeys((name, part) for _, _, name, _, part in table):
        cells = [table.get((arch, "bfloat16", name, rank, part)) for rank in ranks]
        rows.append([f"{name}, {part}", *(digits(cell.issue) if cell else "" for cell in cells)])
    return markdown([f"nvcc {version}, sm_{arch}", *map(str, ranks)], *rows)


def side_by_side() -> str:
    """A row a layer, a column a GPU: microseconds and tax."""
    rows = []
    for name, sizes in SIDE_BY_SIDE:
        kernels, options = OURS[name]
        layer = Layer(*sizes, **options)
        row = [f"{name}, {sizes[0]} -> {sizes[1]}"]
        for gpu in GPUS:
            seconds = sum(work.seconds(gpu) for work in kernels(layer, gpu))
            row.append(f"{microseconds(seconds)} ({digits(100 * seconds / layer.base_seconds(gpu))}%)")
        rows.append(row)
    return markdown(["µs (tax)", *(gpu.name for gpu in GPUS)], *rows)


def siblings_table() -> str:
    """A row a module whose layers read the same x, a column a GPU: one by one and together."""
    rows = []
    for name, n, outs in SIBLINGS:
        layers = [Layer(n, m) for m in outs]
        row = [f"{name}, {n} -> {', '.join(map(str, outs))}"]
        for gpu in (gpu for gpu in GPUS if gpu.name in ("RTX 4090", "H100")):
            alone = [work for layer in layers for work in grouped_lora(layer, gpu)] + sums_of_dx(layers)
            for works in (alone, sibling_lora(layers, gpu)):
                seconds = sum(work.seconds(gpu) for work in works)
                row.append(f"{microseconds(seconds)} ({len(works)})")
        rows.append(row)
    head = [f"{gpu}, {how}" for gpu in ("RTX 4090", "H100") for how in ("one by one", "together")]
    return markdown(["µs (kernels)", *head], *rows)


def gap(layer: Layer, works: list[Work], gpu: Gpu) -> dict[str, float]:
    """Where the seconds go: the floor, and what is beyond it."""
    moved: Counter[str] = Counter()
    for work in works:
        for access in work.accesses:
            moved[access.name] += access.size
    x, y = layer.sizes["x"][1], layer.sizes["y"][1]
    causes = {
        "floor": 3 * x + 2 * y,  # forward x and y, backward dy, x and dx
        "dy again": moved["dy"] - y,
        "x again": moved["x"] - 2 * x,
    }
    causes["latents, adapters"] = moved.total() - sum(causes.values())
    seconds = {cause: size / (gpu.hbm * gpu.memory) for cause, size in causes.items()}
    seconds["other limits"] = sum(work.seconds(gpu) - gpu.launch - work.limits(gpu)["memory"] for work in works)
    seconds["launches"] = gpu.launch * len(works)
    return seconds


def gap_table(gpu: Gpu) -> str:
    """A row an architecture, for the first of the layers."""
    rows = []
    for name, (kernels, options) in OURS.items():
        layer = Layer(*LAYERS[0], **options)
        causes = gap(layer, kernels(layer, gpu), gpu)
        causes["all"] = sum(causes.values())
        rows.append([name, *map(microseconds, causes.values())])
    return markdown(["µs", *causes], *rows)


def tax_table(gpu: Gpu) -> str:
    """A row an architecture: what its kernels take, divided by the frozen layer's two products."""
    floor = ["each big operand once", "", ""]
    for sizes in LAYERS:
        layer = Layer(*sizes)
        seconds = gap(layer, grouped_lora(layer, gpu), gpu)["floor"]
        floor += [microseconds(seconds), f"{digits(100 * seconds / layer.base_seconds(gpu))}%"]
    rows = [floor]
    for name, (kernels, options) in {**OURS, **OTHERS}.items():
        row = [name]
        for sizes in LAYERS:
            layer = Layer(*sizes, **options)
            works = kernels(layer, gpu)
            if sizes == LAYERS[0]:
                row += [str(len(works)), f"{sum(work.bytes for work in works) / 1e9:.2f}"]
            seconds = sum(work.seconds(gpu) for work in works)
            row += [microseconds(seconds), f"{digits(100 * seconds / layer.base_seconds(gpu))}%"]
        rows.append(row)
    layers = [text for n, m in LAYERS for text in (f"{n} -> {m}: µs", "tax")]
    return markdown(["", "kernels", "GB", *layers], *rows)


def tables(gpu: Gpu) -> str:
    """All of them, with what they rest on."""
    layer = Layer(*LAYERS[0])
    products = " and ".join(microseconds(Layer(n, m).base_seconds(gpu)) for n, m in LAYERS)
    datasheet = (
        f"Datasheet ({gpu.name} SXM): {gpu.memory / 1e12:g} TB/s, {gpu.tensor / 1e12:g} TFLOP/s of dense bfloat16, "
        f"{gpu.multiprocessors} multiprocessors of {gpu.schedulers} schedulers at {gpu.clock / 1e9:g} GHz; 50 MiB of "
        "second-level cache, which serves what is read again at no cost."
    )
    assumed = (
        f"Assumed: a stream gets {gpu.hbm:g} of the memory, a scheduler issues in {gpu.issue:g} of the cycles, "
        f"mma.sync gets {gpu.mma:g} and the frozen layer's products {gpu.gemm:g} of the tensor cores ({products} µs "
        f"for y and dx), a load takes {1e6 * gpu.latency:g} µs, a launch {1e6 * gpu.launch:g} µs; units overlap."
    )
    sizes = f"T = {layer.tokens}, bfloat16, r = {layer.rank}, N = 5, with dropout (p = 0.1)."
    return "\n\n".join([
        "\n".join(textwrap.fill(text, 118) for text in (datasheet, assumed, sizes)),
        "Instructions of a warp for a tile of 16 KiB, by padded rank. mask: what one adds. piece: a tile's share of\n"
        "loading the adapter matrix into shared memory. router: what weights on latent rows add.",
        tile_table(gpu.arch),
        f"{LAYERS[0][0]} -> {LAYERS[0][1]}, kernel by kernel, each limit by itself:",
        kernel_table(grouped_lora(layer, gpu), gpu),
        "The same layer, where the time of each architecture goes:",
        gap_table(gpu),
        "The adapter tax, what an adapter adds to the frozen layer's products, forward and backward:",
        tax_table(gpu),
        "GPUs side by side (A100 and RTX 4090 with sm_80's machine code, the others with sm_90's):",
        side_by_side(),
        "Layers that read the same x, by lora, an operator each with autograd's sums of their dx, and by sibling_lora:",
        siblings_table(),
    ])  # fmt: skip


def main() -> None:
    """Prints the tables, or writes them between the markers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gemm", type=float, default=Gpu.gemm, help="fraction of the tensor cores' peak")
    parser.add_argument("--hbm", type=float, default=Gpu.hbm, help="fraction of the memory's bandwidth")
    parser.add_argument("--write", type=Path, metavar="FILE")
    options = parser.parse_args()
    show(tables(Gpu(gemm=options.gemm, hbm=options.hbm)), (BEGIN, END), options.write)


if __name__ == "__main__":
    main()
