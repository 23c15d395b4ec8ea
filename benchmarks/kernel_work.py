"""What our kernels of an adapted layer move and compute.

Bytes are those that cpp_tests/simt counts (check_ledger in test_grouped_lora_cuda.cpp), the work is cut as in
csrc/cuda/plan.h, and what a warp does for a tile is read from the machine code (tile_work.py). eager_work.py has what
eager PyTorch launches, gpus.py the hardware; roofline.py makes tables.
"""

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple

import tile_work
from gpus import Gpu
from tile_work import TileWork

ELEMENT = 2  # bytes of bfloat16; our latents are float
TILE_ROWS, TILE_COLS = 128, 64
OUTER_COLS, SWEEP_COLS = 128, 256  # of a block of outer products, and of the sweep (plan.h)
TILE_BYTES, WARPS, LANES = TILE_ROWS * TILE_COLS * ELEMENT, 8, 32
PHILOX, KEEP = 60, 3  # instructions: ten rounds of two products, two three-way xors and two keys; from bits to a mask


@dataclass(frozen=True)
class Layer:
    """An adapted layer in bfloat16."""

    in_dim: int
    out_dim: int
    tokens: int = 8192
    rank: int = 8
    heads: int = 1
    site: str = "input"  # of dropout: input, latent, input_per_head, none
    router: bool = False
    offset_rank: int = 0

    @property
    def sizes(self) -> dict[str, tuple[int, int]]:
        """Columns and bytes of the token matrices."""
        n, m = self.in_dim, self.out_dim
        columns = {"x": n, "y": m, "dy": m, "dx": n}
        return {name: (cols, ELEMENT * self.tokens * cols) for name, cols in columns.items()}

    @property
    def tiles(self) -> int:
        """Row tiles."""
        return ceil_div(self.tokens, TILE_ROWS)

    @property
    def masks(self) -> int:
        """Masks for each element of x."""
        return {"input": 1, "input_per_head": self.heads}.get(self.site, 0)

    def latent(self, ranks: int) -> int:
        """Bytes of so many columns of float."""
        return 4 * self.tokens * ranks

    def base_seconds(self, gpu: Gpu) -> float:
        """The frozen layer's two products, y and dx."""
        return 2 * 2 * self.tokens * self.in_dim * self.out_dim / (gpu.gemm * gpu.tensor)


class Access(NamedTuple):
    """An array that a kernel reads or writes; beyond the first time the second-level cache has it."""

    name: str
    size: int  # bytes
    times: int = 1


@dataclass(frozen=True)
class Blocks:
    """Blocks that do the same, side by side in a launch."""

    count: int
    tiles: int  # that each of them runs through, one after the other
    tile: TileWork  # what each of its warps does for one
    loads: bool = True  # two tiles are under way while one is computed (kStages of the kernels); else only written

    def alone(self, gpu: Gpu) -> float:
        """Seconds of one, with a multiprocessor to itself: its warps' own time, and the way of the bytes."""
        way = gpu.latency / 2 if self.loads else 0
        return self.tiles * max(self.tile.alone / gpu.clock, way, *self.seconds(gpu).values())

    def seconds(self, gpu: Gpu) -> dict[str, float]:
        """Of one tile, by each unit of a multiprocessor."""
        of_scheduler = {
            "issue slots": self.tile.issue / gpu.issue,
            "integers": self.tile.integer,
            "products": self.tile.product,
            "conversions": self.tile.convert,
        }
        cycles = {unit: WARPS / gpu.schedulers * value for unit, value in of_scheduler.items()}
        cycles["shared memory"] = WARPS * self.tile.shared
        return {unit: value / gpu.clock for unit, value in cycles.items()}


@dataclass(frozen=True)
class Work:
    """What a kernel moves and computes."""

    name: str
    accesses: list[Access] = field(default_factory=list)
    tensor: int = 0  # FLOPs of tensor cores, ranks padded
    ffma: int = 0  # FLOPs in float32
    integer: int = 0  # instructions of threads, for masks, in kernels that have no tiles
    blocks: list[Blocks] = field(default_factory=list)  # in the launch's order
    floor: int = 0  # bytes with every big operand once

    def __add__(self, other: "Work") -> "Work":
        """Both in one launch, whose blocks run side by side."""
        return Work(
            self.name, self.accesses + other.accesses, self.tensor + other.tensor, self.ffma + other.ffma,
            self.integer + other.integer, self.blocks + other.blocks, self.floor + other.floor,
        )  # fmt: skip

    @property
    def bytes(self) -> int:
        """From and to memory."""
        return sum(access.size for access in self.accesses)

    def limits(self, gpu: Gpu) -> dict[str, float]:
        """Seconds by each of them; a unit of a multiprocessor is the limit where most blocks are."""
        limits = {
            "memory": self.bytes / (gpu.hbm * gpu.memory),
            "tensor cores": self.tensor / (gpu.mma * gpu.tensor),
            "FFMA": self.ffma / gpu.ffma,
            "integers": self.integer / (gpu.multiprocessors * gpu.schedulers * LANES / 2 * gpu.clock),
        }
        if not self.blocks:
            return limits
        for unit, seconds in busiest(self.blocks, gpu).items():
            limits[unit] = limits.get(unit, 0) + seconds
        alone = [(blocks.count, blocks.alone(gpu)) for blocks in self.blocks]
        in_turn = sum(count * seconds for count, seconds in alone) / (gpu.multiprocessors * gpu.resident)
        limits["one block"] = max(in_turn, *(seconds for _, seconds in alone))
        return limits

    def seconds(self, gpu: Gpu) -> float:
        """The modelled time, with the launch."""
        return max(self.limits(gpu).values()) + gpu.launch


def busiest(groups: list[Blocks], gpu: Gpu) -> dict[str, float]:
    """Seconds of each unit of the multiprocessor that has most to do; each block goes to the one with least so far."""
    units: dict[str, float] = {}
    for unit in groups[0].seconds(gpu):
        loads = [0.0] * gpu.multiprocessors
        for blocks in groups:
            cost = blocks.tiles * blocks.seconds(gpu)[unit]
            for _ in range(blocks.count):
                heapq.heapreplace(loads, loads[0] + cost)
        units[unit] = max(loads)
    return units


Kernels = Callable[[Layer, Gpu], list[Work]]


def ceil_div(value: int, divisor: int) -> int:
    """Rounds up."""
    return -(-value // divisor)


def mask_instructions(masks: int, of_block: int = 8) -> int:
    """For so many masks, so many from a Philox block."""
    return masks * (PHILOX + of_block * KEEP) // of_block


# ---- csrc/cuda/plan.h


def splits(cols: int, tiles: int, gpu: Gpu, most: int = 1 << 15) -> int:
    """Splits of columns that a token matrix is cut into."""
    of_row = max(ceil_div(cols, TILE_COLS), 1)
    most = min(max(of_row // 4, 1), most)
    fewest = min(max(2 * gpu.multiprocessors // tiles, 1), most)
    busiest = {
        count: ceil_div(tiles * count, gpu.multiprocessors) * ceil_div(of_row, count)
        for count in range(fewest, min(fewest + 3, most) + 1)
    }
    return ceil_div(of_row, ceil_div(of_row, min(busiest, key=busiest.__getitem__)))


def padded(rank: int) -> int:
    """Ranks that a kernel computes; beyond 64 it also reads everything again, which is not modelled."""
    return 16 if rank <= 16 else 32 if rank <= 32 else ceil_div(rank, 64) * 64


def tile(gpu: Gpu, loop: str, ranks: int, masks: int = 0, weighted: bool = False) -> TileWork:
    """What a warp does for a tile in a loop of tile_work.csv; beyond 64 ranks once for each 64 of them."""
    rank = min(padded(ranks), 64)
    parts = tile_work_of(gpu.arch, loop, rank)
    work = parts["tile"].plus(parts.get("piece", TileWork()))
    work = work.plus(parts["mask"], masks) if masks else work
    work = work.plus(parts["router"]) if weighted else work
    return TileWork().plus(work, padded(ranks) // rank)


@cache
def tile_work_of(arch: int, loop: str, rank: int) -> dict[str, TileWork]:
    """The parts of a row of tile_work.csv, in bfloat16."""
    return {part: work for (*key, part), work in tile_work.read()[1].items() if key == [arch, "bfloat16", loop, rank]}


def outer_rows(rank: int) -> int:
    """Rows of a chunk, whose outer products a block sums for a gradient of so many ranks."""
    return 512 if rank <= 16 else 1024 if rank <= 32 else 2048


def one_pass(layer: Layer) -> bool:
    """Whether grouped_lora's backward reads dy once."""
    return layer.rank <= 16


# ---- Kernels, named by what they stream


def streams(
    layer: Layer, gpu: Gpu, cols: int, count: int, loop: str, ranks: int, masks: int, loads: bool = True
) -> Blocks:
    """The blocks of shrink and expand: a row tile and a split of the columns."""
    tiles = ceil_div(ceil_div(cols, TILE_COLS), count)
    return Blocks(layer.tiles * count, tiles, tile(gpu, loop, ranks, masks), loads)


def shrink(layer: Layer, gpu: Gpu, tall: str, ranks: int) -> Work:
    """The splits' partials of x Aᵀ, or of dy B."""
    cols, size = layer.sizes[tall]
    count = splits(cols, layer.tiles, gpu, most=8 if tall == "x" else 1 << 15)
    small = Access("A" if tall == "x" else "B", ELEMENT * ranks * cols, layer.tiles)
    accesses = [Access(tall, size), small, Access("partials", count * layer.latent(ranks))]
    blocks = streams(layer, gpu, cols, count, "shrink", ranks, layer.masks if tall == "x" else 0)
    return Work(f"shrink {tall}", accesses, 2 * layer.tokens * cols * padded(ranks), blocks=[blocks], floor=size)


def expand(layer: Layer, gpu: Gpu, tall: str, ranks: int, latents: Access, chunk: int = 0) -> Work:
    """The term z Bᵀ, or dz A, to which the frozen product is added; latents are read by every split.

    chunk: the launch's ranks, where there are more.
    """
    cols, size = layer.sizes[tall]
    count = splits(cols, layer.tiles, gpu)
    small = Access("A" if tall == "dx" else "B", ELEMENT * ranks * cols, layer.tiles)
    read = latents._replace(times=latents.times - 1 + count)
    accesses = [Access(tall, size), small, read]
    computed = max(ranks, chunk)
    blocks = streams(layer, gpu, cols, count, tall, computed, layer.masks if tall == "dx" else 0, loads=False)
    return Work(f"expand {tall}", accesses, 2 * layer.tokens * cols * padded(computed), blocks=[blocks], floor=size)


def outer(
    layer: Layer,
    gpu: Gpu,
    tall: str,
    latents: str,
    ranks: int,
    masks: int = 0,
    chunk: int = 0,
    cols_each: int = OUTER_COLS,
) -> Work:
    """The gradient latentsᵀ x, or latentsᵀ dy: a block has some columns and a chunk of rows, for all masks.

    chunk: the ranks that the launch computes at once, where these are others. A router's weights multiply u.
    """
    cols, size = layer.sizes[tall]
    count, computed = ceil_div(cols, cols_each), chunk or ranks
    rows_each = outer_rows(ceil_div(ranks, max(masks, 1)))
    chunks = ceil_div(layer.tokens, rows_each)
    rows, gradient = Access(latents, layer.latent(ranks), count), Access("gradients", 4 * ranks * cols)
    sums = [Access("sums", chunks * gradient.size)] if chunks > 1 else []
    tiles = cols_each // TILE_COLS * ceil_div(min(rows_each, layer.tokens), TILE_ROWS)
    blocks = Blocks(count * chunks, tiles, tile(gpu, "outer", computed, masks, layer.router and latents == "u"))
    tensor = 2 * layer.tokens * cols * padded(computed)
    return Work(f"outer {tall}", [Access(tall, size), rows, gradient, *sums], tensor, blocks=[blocks])


def sum_chunks(outers: Iterable[Work]) -> list[Work]:
    """The launch that adds the sums of chunks of rows, if there are any."""
    sums = [access for work in outers for access in work.accesses if access.name == "sums"]
    return [Work("sum of the chunks", sums)] if sums else []


def small(layer: Layer, name: str, ranks: dict[str, int], masks: int = 0) -> Work:
    """A kernel of latents alone, a mask a Philox block: arrays and their columns."""
    accesses = [Access(array, layer.latent(columns)) for array, columns in ranks.items()]
    masks = mask_instructions(layer.tokens * masks, of_block=1)
    return Work(name, accesses, ffma=2 * layer.tokens * sum(ranks.values()), integer=masks)


def latents_and_y(layer: Layer, gpu: Gpu, partials: Access) -> Work:
    """Expand y from partials of z; its first split writes z too, if the partials are read again for it."""
    y = expand(layer, gpu, "y", layer.rank, partials)
    return y + small(layer, "z", {"z": layer.rank}) if partials.times > 1 else y


def pass_over_dy(layer: Layer, gpu: Gpu) -> tuple[int, Work, list[Work]]:
    """How many partials of dz there are, the pass over dy that makes them, and dB where another one makes it."""
    r, d_b = layer.rank, outer(layer, gpu, "dy", "z", layer.rank)
    if not one_pass(layer):
        return splits(layer.out_dim, layer.tiles, gpu), shrink(layer, gpu, "dy", r), [d_b]
    count = ceil_div(layer.out_dim, SWEEP_COLS)
    both = [
        Access("B", ELEMENT * r * layer.out_dim, ceil_div(layer.tokens, outer_rows(r))),
        Access("partials", count * layer.latent(r)),
    ]
    d_b = outer(layer, gpu, "dy", "z", r, cols_each=SWEEP_COLS)
    dot = Work("", both, d_b.tensor, floor=layer.sizes["dy"][1])
    d_b = replace(d_b, blocks=[replace(blocks, tile=tile(gpu, "sweep", r)) for blocks in d_b.blocks])
    return count, replace(d_b + dot, name="sweep dy"), []


def grouped_lora(layer: Layer, gpu: Gpu) -> list[Work]:
    """Kernels of lora and align_lora (csrc/cuda/grouped_lora.cu)."""
    r, count = layer.rank, splits(layer.in_dim, layer.tiles, gpu, most=8)
    # Every split of expand adds the partials; the first one also for z, where there are several.
    partials = Access("partials", count * layer.latent(r), 1 + (count > 1))
    of_dz, of_dy, last = pass_over_dy(layer, gpu)
    d_a, sums = outer(layer, gpu, "x", "dz", r, layer.masks), last or [of_dy]
    return [
        shrink(layer, gpu, "x", r),
        latents_and_y(layer, gpu, partials),
        of_dy,
        small(layer, "sum of the partials", {"partials": of_dz * r, "dz": r}),
        backward(layer, gpu, r, [d_a, *last]),
        *sum_chunks([d_a, *sums]),
    ]


def sibling_lora(layers: Sequence[Layer], gpu: Gpu) -> list[Work]:
    """Kernels of layers with the same x (csrc/cuda/sibling_lora.cu)."""
    first, count = layers[0], len(layers)
    stride = ceil_div(max(layer.rank for layer in layers), 8) * 8
    width = (count - 1) * stride + layers[-1].rank
    shared = replace(first, rank=width, heads=count, site="input_per_head" if first.masks else "none")
    x_splits = splits(first.in_dim, first.tiles, gpu, most=8)
    passes = [pass_over_dy(layer, gpu) for layer in layers]
    d_a = outer(shared, gpu, "x", "dz", width, shared.masks)
    partials = sum(of_dz * layer.rank for layer, (of_dz, *_) in zip(layers, passes, strict=True))
    return [
        shrink(shared, gpu, "x", width),
        *(latents_and_y(layer, gpu, Access("partials", x_splits * layer.latent(layer.rank), 2)) for layer in layers),
        *(work for _, of_dy, d_b in passes for work in (of_dy, *d_b)),
        small(first, "sum of the partials", {"partials": partials, "dz": width}),
        backward(shared, gpu, width, [d_a]),
        *sum_chunks([d_a, *((d_b or [of_dy])[0] for _, of_dy, d_b in passes)]),
    ]


def heads(layer: Layer, gpu: Gpu) -> list[Work]:
    """Kernels of several heads, with or without a router (csrc/cuda/heads.cuh)."""
    r, count, per_head = layer.rank, layer.heads, layer.site == "input_per_head"
    latents = count if per_head else 1
    ranks_a = latents * (ceil_div(r, 8) * 8 if per_head else r) + layer.offset_rank
    logits = count if layer.router else 0
    width = ceil_div(ranks_a, 8) * 8 + logits if layer.router else ranks_a
    u, z, du = count * r, latents * r, count * r + layer.offset_rank
    x_splits, dy_splits = splits(layer.in_dim, layer.tiles, gpu, most=8), splits(layer.out_dim, layer.tiles, gpu)
    masks = u if layer.site == "latent" else 0
    last = max(width, du)  # the last launch computes all of its products at the ranks of the largest
    d_a = outer(layer, gpu, "x", "dz", width, layer.masks, last)  # and dR
    d_b = outer(layer, gpu, "dy", "u", u, chunk=last)
    combined = {"partials": dy_splits * du, "z": z, "u": u, "dz": width, "w": logits}
    return [
        shrink(layer, gpu, "x", width),
        small(layer, "combine heads", {"partials": x_splits * width, "z": z, "w": logits, "u": du}, masks),
        expand(layer, gpu, "y", du, Access("u", layer.latent(du + logits))),
        shrink(layer, gpu, "dy", du),
        small(layer, "combine heads, backward", combined, masks),
        backward(layer, gpu, width, [d_a, d_b], last),
        *sum_chunks([d_a, d_b]),
    ]


def backward(layer: Layer, gpu: Gpu, ranks: int, gradients: list[Work], chunk: int = 0) -> Work:
    """The last launch: gradients of the adapters, and dx."""
    dx = expand(layer, gpu, "dx", ranks, Access("dz", layer.latent(ranks)), chunk)
    first = Work("backward: dA, dB, dx", floor=layer.sizes["x"][1])  # dA waits for dz
    return sum([*gradients, dx], first)
