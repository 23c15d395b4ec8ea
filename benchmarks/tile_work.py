"""What one warp does for one tile of a token matrix (plan.h: 128 rows of 128 bytes), read from the machine code.

Each loop over tiles is found as in sass.py, and of its paths the one with most instructions is taken. Never taken are
those that a layer in 16 bits does not run for each tile where its widths are multiples of 8, its adapters have its
dtype, the frozen product is added later and there is no bias: copies of single elements, row numbers of groups,
conversions, Philox blocks that begin within a unit, inputs and biases of what is written. What a mask, a piece of the
adapter matrix and a router's weights on latent rows add is counted apart.

How often an inner loop runs follows from what a tile needs: each warp multiplies rank / 2 pairs of fragments, and all
threads together load a piece of the adapter matrix for 2 to 7 tiles.

Usage: python benchmarks/tile_work.py [--write]

Prints the table, or writes it to tile_work.csv, where kernel_work.py reads it. Needs nvcc and nvdisasm.
"""

import argparse
import csv
import re
import sys
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple, TextIO

import cuda_static
import sass

TABLE = Path(__file__).with_suffix(".csv")
ARCHS = [80, 90]
SOURCES = ["projection.cu", "grouped_lora.cu"]
PIECE_TILES = {16: 7, 32: 4, 64: 2}  # kPieceTiles of row_tile.cuh
LANES = "0x7fff7fff"  # of two 16-bit lanes, as they are compared with the threshold
THREADS, TILE_COLS, UNIT = 256, 64, 8  # of a block; columns of a tile, and of 16 bytes of it
COPIES = 4  # units that a thread copies of a tile
CONFLICT = 4  # single elements of a piece go to one bank 4 at a time, where A lies along its columns; 2 to 8 of B
PHILOX = re.compile(r"-0x2daee0ad|-0x326172a9|0xd2511f53|0xcd9e8d57")
INTEGER = re.compile(
    r"(IADD3|LOP3|ISETP|SHF|LEA|SEL|PRMT|V?IMNMX|VIADD|VIADDMNMX|IABS|PLOP3|P2R|R2P|MOV|FSETP|FSEL|F2FP)$"
)
CONVERT = re.compile(r"(I2F|F2I|F2F|MUFU|POPC|FLO)$")
FLOAT = re.compile(r"(FADD|FMUL|FFMA|HADD2|HMUL2|HFMA2)$")


class TileWork(NamedTuple):
    """Of one warp for one tile, in cycles.

    Integers, logic and packing have 16 lanes a scheduler; so have products of integers, those of 64 bits at half of
    that rate (and floats on sm_80); conversions and reciprocals have 4.
    """

    issue: float = 0.0  # one for each instruction, also of a predicated one that does nothing
    integer: float = 0.0
    product: float = 0.0
    convert: float = 0.0
    shared: float = 0.0  # of shared memory and L1, 128 bytes each: all warps of a multiprocessor take turns
    alone: float = 0.0  # that the warp takes with nothing beside it, by the compiler's stall counts; waits come on top

    def plus(self, other: "TileWork", times: float = 1) -> "TileWork":
        """This and so many times the other."""
        return TileWork(*(mine + times * more for mine, more in zip(self, other, strict=True)))


def is_work(instruction: sass.Instruction) -> bool:
    """Whether it is what every tile needs: copies, products and their operands, latent rows."""
    return instruction.base in {"LDGSTS", "HMMA", "LDSM", "BAR", "LDGDEPBAR"} or instruction.matches("STS.U16")


def of_instruction(instruction: sass.Instruction, arch: int) -> TileWork:
    """One issue of an instruction."""
    base, modifiers = instruction.base, instruction.opcode.split(".")[1:]
    product = 0
    if base == "IMAD":
        product = 4 if "WIDE" in modifiers or "HI" in modifiers else 2
    elif FLOAT.match(base):
        product = 2 if arch == 80 else 1
    shared = 0
    if base == "LDSM":
        shared = int(modifiers[-1])
    elif base == "SHFL":
        shared = 1
    elif base in {"LDS", "STS", "LDGSTS", "LDG", "STG"} and instruction.predicate != "!PT":
        shared = next((int(bits) // 32 for bits in ("128", "64") if bits in modifiers), 1)
    return TileWork(
        1, 2 * bool(INTEGER.match(base)), product, 8 * bool(CONVERT.match(base)), shared, instruction.stall
    )  # fmt: skip


class Loop:
    """A loop of a kernel over the tiles of a token matrix."""

    def __init__(self, kernel: cuda_static.Kernel, head: int) -> None:
        """head: where the loop begins."""
        self.kernel, self.head = kernel, head
        self.code, self.arch, self.flow = kernel.code, kernel.arch, kernel.flow
        self.body = self.flow.loops[head]
        match = re.match(r"(\w+)_kernel<Mma<(\w+), (\d+)>", kernel.name)
        assert match
        family, self.dtype, self.rank = match[1], match[2], int(match[3])
        stores = self.count(self.body, lambda i: i.matches("STG.128"))
        self.name = {"backward": "dx" if stores else "outer", "expand": "y"}.get(family, family)
        self.tiles = (self.count(self.body, lambda i: i.matches("LDGSTS.128")) or stores) // COPIES
        self.inner = [loop for loop in self.flow.loops.values() if loop < self.body]

    def count(self, loop: Iterable[int], wanted: Callable[[sass.Instruction], object]) -> int:
        """The instructions that are wanted."""
        return sum(bool(wanted(self.code[i])) for i in loop)

    def draws(self, loop: Iterable[int]) -> int:
        """Products of Philox."""
        return self.count(loop, lambda i: i.base == "IMAD" and PHILOX.search(i.operands))

    def fragments(self, loop: Iterable[int]) -> int:
        """Products of tensor cores."""
        return self.count(loop, lambda i: i.base == "HMMA")

    def single_stores(self, loop: Iterable[int]) -> int:
        """Elements of 16 bits that are stored to shared memory: pieces and latent rows."""
        return self.count(loop, lambda i: i.matches("STS.U16"))

    def trips(self, loop: frozenset[int]) -> float:
        """How often an inner loop runs in one turn of this one."""
        if self.fragments(loop):
            return 1  # a chunk of ranks, a mask: all products of a tile
        if self.is_piece(loop):
            units = self.rank * TILE_COLS * PIECE_TILES[self.rank] / UNIT / THREADS
            alike = [o for o in self.inner if self.is_piece(o) and self.single_stores(o) == self.single_stores(loop)]
            return units / len(alike)
        latents = self.single_stores(loop) or self.count(loop, lambda i: i.base == "FADD")
        if latents and self.name in {"y", "dx"}:
            return 0  # latent rows of another chunk of ranks, and sums of partials for them
        if self.draws(loop) or self.count(loop, lambda i: i.matches("LDG.U16")):
            return 0  # cold: a further block of Philox, single elements
        raise ValueError(f"{self.name}, rank {self.rank}: what is the loop of {len(loop)} instructions at {min(loop)}?")

    def is_piece(self, loop: frozenset[int]) -> bool:
        """Whether it loads a piece of the adapter matrix, a unit at a time."""
        return not self.fragments(loop) and bool(self.count(loop, lambda i: i.matches("LDG.128")))

    @cached_property
    def pieces(self) -> set[int]:
        """What loads them."""
        return {i for loop in self.inner if self.is_piece(loop) for i in loop}

    @cached_property
    def shifts(self) -> set[int]:
        """Further Philox blocks, for units that do not begin with one."""
        return {i for loop in self.inner if self.draws(loop) and not self.fragments(loop) for i in loop}

    @cached_property
    def masking(self) -> set[int]:
        """What is only run for a mask: the widest dominated parts with Philox or lanes, and without other work."""
        found: set[int] = set()
        before_work = {by for i in self.body if is_work(self.code[i]) for by in self.flow.dominators(i)}
        for draw in sorted(self.body):
            lanes = LANES in self.code[draw].operands
            if (lanes or self.draws([draw])) and draw not in found:
                chain = self.flow.dominators(draw)  # each dominates what the next one does, and more
                first = bisect(chain, False, key=lambda by: by not in before_work)
                found |= self.flow.dominated(chain[first]) & self.body if first < len(chain) else {draw}
        return found

    def executed(self, *, mask: bool = False, piece: bool = False, router: bool = False) -> Counter[int]:
        """Instructions of one turn, without or with masks, a new piece, latent rows that a router weighs."""
        streams = self.name in {"shrink", "y", "dx"}  # a warp its own rows: it meets the others only for a piece

        def cold(i: int) -> bool:
            instruction = self.code[i]
            if instruction.matches("LDG.U16") or instruction.matches("STG.U16"):
                return True  # single elements, also where each has a predicate
            if instruction.predicate:
                return False
            if instruction.matches("LDG.64"):
                return True  # row numbers
            if self.name in {"y", "dx"} and i not in self.pieces and instruction.base in {"LDG", "LDS"}:
                return True  # what is added to the product, the bias
            if i in self.shifts:
                return True
            if instruction.base == "F2FP" and i in self.pieces:
                return True  # adapters in float
            if instruction.base == "I2F":
                return not (piece or router)  # divisions: the lines of a piece, a router's heads
            return (not mask and i in self.masking) or (streams and not piece and instruction.base == "BAR")

        return self.flow.executed(self.head, self.trips, cold)

    def work(self, times: Counter[int]) -> TileWork:
        """Of one tile."""
        total = TileWork()
        for i, turns in times.items():
            once = of_instruction(self.code[i], self.arch)
            if i in self.pieces and self.single_stores([i]):
                once = once._replace(shared=CONFLICT * once.shared)
            total = total.plus(once, turns / self.tiles)
        return total

    @cached_property
    def parts(self) -> dict[str, TileWork]:
        """A tile without masks; what a mask, its share of a piece and a router's weights on latent rows add."""
        plain = self.work(self.executed())
        parts = {"tile": plain}
        if self.name in {"shrink", "dx", "outer"}:
            parts["mask"] = self.work(self.executed(mask=True)).plus(plain, -1)
        if self.name == "outer":
            parts["router"] = self.work(self.executed(router=True)).plus(plain, -1)
        if self.pieces:
            piece = self.work(self.executed(piece=True)).plus(plain, -1)
            parts["piece"] = TileWork().plus(piece, 1 / PIECE_TILES[self.rank])
        return parts


def tile_loops(kernel: cuda_static.Kernel) -> Iterator[Loop]:
    """The loops of a kernel in 16 bits over tiles: the innermost with products and with copies or stores."""
    if "Mma<" not in kernel.name:
        return

    def has(loop: frozenset[int], *opcodes: str) -> bool:
        return any(kernel.code[i].matches(opcode) for i in loop for opcode in opcodes)

    loops = kernel.flow.loops.items()
    found = {head: loop for head, loop in loops if has(loop, "HMMA") and has(loop, "LDGSTS.128", "STG.128")}
    for head, loop in found.items():
        if not any(other < loop for other in found.values()):
            yield Loop(kernel, head)


Table = dict[tuple[int, str, str, int, str], TileWork]  # by architecture, dtype, loop, rank and part


def table(loops: Iterable[Loop]) -> Table:
    """Of these loops, without those that add partials when they fill the latent rows."""
    rows: Table = {}
    for loop in loops:
        for part, work in loop.parts.items() if "SumOfPartials" not in loop.kernel.name else ():
            rows[loop.arch, loop.dtype, loop.name, loop.rank, part] = TileWork(*map(round, work))
    return dict(sorted(rows.items()))


def write(rows: Table, file: TextIO) -> None:
    """As comma-separated values, with the compiler's version in the first line."""
    file.write(f"# nvcc {cuda_static.nvcc_version()}\n")
    lines = csv.writer(file, lineterminator="\n")
    lines.writerow(["arch", "dtype", "loop", "rank", "part", *TileWork._fields])
    lines.writerows([*key, *work] for key, work in rows.items())


def read(path: Path = TABLE) -> tuple[str, Table]:
    """The version of nvcc, and the table."""
    first, *lines = path.read_text().splitlines()
    rows = {}
    for line in csv.DictReader(lines):
        key = int(line["arch"]), line["dtype"], line["loop"], int(line["rank"]), line["part"]
        rows[key] = TileWork(*(float(line[field]) for field in TileWork._fields))
    return first.split()[-1], rows


def main() -> None:
    """Prints the table, or writes the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    folder = cuda_static.ROOT / "csrc/cuda"
    kernels = (k for name in SOURCES for arch in ARCHS for k in cuda_static.compile_file(folder / name, arch))
    rows = table(loop for kernel in kernels for loop in tile_loops(kernel))
    if options.write:
        with TABLE.open("w") as file:
            write(rows, file)
    else:
        write(rows, sys.stdout)


if __name__ == "__main__":
    main()
