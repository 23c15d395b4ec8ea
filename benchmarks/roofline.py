"""What each CUDA kernel of an adapted layer would take on an H100 if only the hardware's limits held it up.

    time = max(bytes / memory, operations / their unit, the longest block) + launch

A paper model: nothing is measured. kernel_work.py has the bytes and operations.

Usage: python benchmarks/roofline.py [--gemm 0.65] [--hbm 0.9] [--write docs/performance.md]

Prints the tables, or rewrites those between the markers of a file.
"""

import argparse
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from kernel_work import Gpu, Kernels, Layer, Work, grouped_lora, heads, loop
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


def kernel_table(works: list[Work], gpu: Gpu) -> str:
    """A row a kernel."""
    rows = []
    for work in works:
        limits = work.limits(gpu)
        rows.append([
            work.name, f"{work.bytes / 1e6:.0f}", f"{work.bytes_again / 1e6:.0f}", f"{work.tensor / 1e9:.1f}",
            f"{work.tensor / work.bytes:.0f}", max(limits, key=limits.__getitem__), f"{1e6 * work.seconds(gpu):.0f}",
            f"{1e6 * work.floor / (gpu.hbm * gpu.memory):.0f}",
        ])  # fmt: skip
    return markdown(["lora", "MB", "MB again", "GFLOP", "FLOP / B", "limit", "µs", "floor, µs"], *rows)


def gap(layer: Layer, works: list[Work], gpu: Gpu) -> dict[str, float]:
    """Where the seconds go: the floor, and what is beyond it."""
    moved: Counter[str] = Counter()
    for work in works:
        for access in work.accesses:
            moved[access.name] += access.size
    x, y = layer.sizes["x"][1], layer.sizes["y"][1]
    causes = {
        "floor": 3 * x + 2 * y,  # forward x and y, backward dy, x and dx
        "base's y and dx": moved["y_in"] + moved["dx_in"],
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
        rows.append([name, *(f"{1e6 * value:.0f}" for value in causes.values())])
    return markdown(["µs", *causes], *rows)


def tax_table(gpu: Gpu) -> str:
    """A row an architecture: what its kernels take, divided by the frozen layer's two products."""
    floor = ["each big operand once", "", ""]
    for sizes in LAYERS:
        layer = Layer(*sizes)
        seconds = gap(layer, grouped_lora(layer, gpu), gpu)["floor"]
        floor += [f"{1e6 * seconds:.0f}", f"{seconds / layer.base_seconds(gpu):.0%}"]
    rows = [floor]
    for name, (kernels, options) in {**OURS, **OTHERS}.items():
        row = [name]
        for sizes in LAYERS:
            layer = Layer(*sizes, **options)
            works = kernels(layer, gpu)
            if sizes == LAYERS[0]:
                row += [str(len(works)), f"{sum(work.bytes for work in works) / 1e9:.2f}"]
            seconds = sum(work.seconds(gpu) for work in works)
            row += [f"{1e6 * seconds:.0f}", f"{seconds / layer.base_seconds(gpu):.0%}"]
        rows.append(row)
    layers = [text for n, m in LAYERS for text in (f"{n} -> {m}: µs", "tax")]
    return markdown(["", "kernels", "GB", *layers], *rows)


def tables(gpu: Gpu) -> str:
    """All of them, with what they rest on."""
    layer = Layer(*LAYERS[0])
    products = " and ".join(f"{1e6 * Layer(n, m).base_seconds(gpu):.0f}" for n, m in LAYERS)
    datasheet = (
        f"Datasheet (H100 SXM): {gpu.memory / 1e12:g} TB/s, {gpu.tensor / 1e12:g} TFLOP/s of dense bfloat16, "
        f"{gpu.ffma / 1e12:g} of float32 (integers: a quarter in instructions), "
        f"{gpu.multiprocessors} multiprocessors; 50 MiB of second-level cache, which serves what is read again."
    )
    assumed = (
        f"Assumed: a stream gets {gpu.hbm:g} of the memory, the frozen layer's products {gpu.gemm:g} of the tensor "
        f"cores ({products} µs for y and dx), a block {gpu.block / 1e9:g} GB/s, a launch {1e6 * gpu.launch:g} µs; "
        "units overlap."
    )
    sizes = f"T = {layer.tokens}, bfloat16, r = {layer.rank}, N = 5, with dropout."
    return "\n\n".join([
        "\n".join(textwrap.fill(text, 118) for text in (datasheet, assumed, sizes)),
        f"{LAYERS[0][0]} -> {LAYERS[0][1]}, kernel by kernel:",
        kernel_table(grouped_lora(layer, gpu), gpu),
        "The same layer, where the time of each architecture goes:",
        gap_table(gpu),
        "The adapter tax, what an adapter adds to the frozen layer's products, forward and backward:",
        tax_table(gpu),
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
