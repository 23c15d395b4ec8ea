"""The paper model of the CUDA kernels: its formulas are those of the plan, of the ledger of bytes and of the loops."""

import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path

import kernel_work
import pytest
import roofline
import torch
from eager_work import loop, sums_of_dx
from gpus import GPUS, Gpu
from kernel_work import Access, Blocks, Layer, Work, grouped_lora, heads
from tile_work import TileWork
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from align_ext.bench.baselines import LoopedHeads, Sizes

ROOT = Path(__file__).parents[1]
TWO = Gpu(multiprocessors=2)  # as in check_ledger


def moved(works):
    """Bytes of each array, with those that are read again."""
    total = Counter()
    for work in works:
        for access in work.accesses:
            total[access.name] += access.size * access.times
    return total


def test_the_tables_in_the_documentation_are_of_this_model():
    page = (ROOT / "docs/cuda.md").read_text()
    written = page.split(roofline.BEGIN)[1].split(roofline.END)[0].strip()
    assert written == roofline.tables(Gpu()), "python benchmarks/roofline.py --write docs/cuda.md"


def test_a_kernel_takes_the_longest_of_its_limits_and_a_launch():
    gpu = Gpu(memory=1e9, hbm=0.5, tensor=2e9, mma=0.5, multiprocessors=2, clock=1e9, launch=0.25)
    work = Work("w", [Access("x", 10**9), Access("A", 10**9, 7)], tensor=10**9, ffma=512 * 10**9, integer=64 * 10**9)
    assert work.limits(gpu) == {"memory": 4, "tensor cores": 1, "FFMA": 1, "integers": 0.5}
    assert work.seconds(gpu) == 4.25


SMALL = Gpu(multiprocessors=2, resident=1, clock=1, issue=0.5, latency=100)


def test_a_tile_takes_each_unit_as_long_as_its_eight_warps_do():
    blocks = Blocks(1, tiles=3, tile=TileWork(issue=10, integer=14, product=6, convert=8, shared=2, alone=30))
    assert blocks.seconds(SMALL) == {
        "issue slots": 8 / 4 * 10 / 0.5,
        "integers": 8 / 4 * 14,
        "products": 8 / 4 * 6,
        "conversions": 8 / 4 * 8,
        "shared memory": 8 * 2,
    }
    assert blocks.alone(SMALL) == 3 * 100 / 2  # two tiles are under way for 100 seconds
    assert blocks.alone(replace(SMALL, latency=10)) == 3 * 40  # its issue slots
    assert blocks.alone(replace(SMALL, latency=10, issue=1)) == 3 * 30  # its warps' stalls


def test_the_busiest_multiprocessor_has_the_blocks_that_are_left_over():
    tile = TileWork(issue=1)  # four seconds a tile
    assert kernel_work.busiest([Blocks(4, 10, tile)], SMALL)["issue slots"] == 2 * 40
    assert kernel_work.busiest([Blocks(5, 10, tile)], SMALL)["issue slots"] == 3 * 40
    # A long one, and small ones that go to the other multiprocessor until it has as much.
    assert kernel_work.busiest([Blocks(1, 50, tile), Blocks(3, 10, tile)], SMALL)["issue slots"] == 200
    assert kernel_work.busiest([Blocks(1, 50, tile), Blocks(8, 10, tile)], SMALL)["issue slots"] == 280


def test_blocks_that_a_multiprocessor_has_no_room_for_wait():
    blocks = Blocks(6, tiles=1, tile=TileWork())
    work = Work("w", blocks=[blocks, Blocks(1, tiles=2, tile=TileWork())])
    assert work.limits(SMALL)["one block"] == (6 + 2) * 50 / 2
    assert work.limits(replace(SMALL, resident=4))["one block"] == 2 * 50


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: gpu.name)
def test_every_gpu_of_the_page_can_be_asked(gpu):
    for kernels, options in roofline.OURS.values():
        works = kernels(Layer(3072, 8192, **options), gpu)
        floor = sum(work.floor for work in works) / (gpu.hbm * gpu.memory)
        assert floor < sum(work.seconds(gpu) for work in works) < 100 * floor


def test_the_clock_is_that_of_the_datasheet_s_tensor_cores():
    flops = {"A100": 2048, "RTX 4090": 512, "H100": 4096, "H200": 4096, "B200": 8192}  # a cycle and multiprocessor
    for gpu in GPUS:
        assert gpu.multiprocessors * gpu.clock * flops[gpu.name] == pytest.approx(gpu.tensor, rel=0.01)


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.4, "0"), (0.6, "1"), (4.4, "4"), (44.6, "45"), (1283, "1300")]
)
def test_numbers_have_two_digits(value, text):
    assert roofline.digits(value) == text


def test_the_bytes_of_one_pass_over_dy_are_those_of_the_ledger():
    total = moved(grouped_lora(Layer(1024, 512, tokens=256, rank=8), TWO))
    x, y, latent = 256 * 1024 * 2, 256 * 512 * 2, 256 * 8 * 4
    # Two row tiles, two splits each way, two blocks of dy's columns and eight of x's, one chunk of rows.
    assert total["x"] == 2 * x
    assert (total["y"], total["dy"], total["dx"]) == (y, y, x)
    assert total["z"] == (1 + 2) * latent
    assert total["partials"] + total["dz"] == (2 + 2 + 1 + 2 * 3 + 2 + 8 + 2) * latent
    assert total["sums"] == 0
    assert total["gradients"] == 4 * 8 * (1024 + 512)
    assert total["A"] == 2 * 2 * 8 * 1024 * 2
    assert total["B"] == (2 + 1) * 8 * 512 * 2


def test_the_bytes_of_two_passes_over_dy_are_those_of_the_ledger():
    total = moved(grouped_lora(Layer(1024, 512, tokens=256, rank=32), TWO))
    assert total["dy"] == 2 * 256 * 512 * 2
    assert total["partials"] + total["dz"] == (2 + 2 + 1 + 2 * 3 + 2 + 8 + 2) * 256 * 32 * 4
    assert total["B"] == (2 + 2) * 32 * 512 * 2


@pytest.mark.parametrize(("tokens", "chunks"), [(512, 0), (513, 2), (1024, 2), (8192, 16)])
def test_the_sums_of_chunks_of_rows_are_written_and_read_once(tokens, chunks):
    total = moved(grouped_lora(Layer(1024, 512, tokens=tokens, rank=8), TWO))
    assert total["sums"] == 2 * chunks * total["gradients"] == 2 * chunks * 4 * 8 * (1024 + 512)


@pytest.mark.parametrize("sizes", roofline.LAYERS)
@pytest.mark.parametrize("name", roofline.OURS)
def test_big_operands_move_as_often_as_the_page_says(name, sizes):
    kernels, options = roofline.OURS[name]
    layer = Layer(*sizes, **options)
    of_memory = Counter()
    for work in kernels(layer, Gpu()):
        for array, size, _ in work.accesses:
            of_memory[array] += size
    x, y = layer.sizes["x"][1], layer.sizes["y"][1]
    assert of_memory["x"] == 2 * x
    passes = 1 if kernels is grouped_lora else 2
    assert [of_memory[array] for array in ("y", "dy", "dx")] == [y, passes * y, x]


def test_operations_are_those_of_the_header():
    for rank in (16, 32):  # one pass over dy and two
        shrink, expand, *of_backward = grouped_lora(Layer(3072, 8192, rank=rank), Gpu())
        forward = 2 * 8192 * rank * (3072 + 8192)
        assert shrink.tensor + expand.tensor == forward
        assert sum(work.tensor for work in of_backward) == 2 * forward


@pytest.mark.parametrize(
    ("name", "launches"),
    [("lora, align_lora", 6), ("m_lora", 7), ("r_lora", 7), ("hydra", 7), ("hydra, input_per_head", 7)],
)
def test_kernels_are_as_many_as_the_page_says(name, launches):
    kernels, options = roofline.OURS[name]
    assert len(kernels(Layer(2048, 5504, **options), Gpu())) == launches


@pytest.mark.parametrize(("outs", "launches"), [((512, 128, 128), 10), ((1536, 1536), 8)])
def test_layers_with_the_same_x_stream_it_as_often_as_one_does(outs, launches):
    layers = [Layer(1024, m, tokens=1024) for m in outs]
    works = kernel_work.sibling_lora(layers, TWO)
    assert len(works) == launches  # shrink; expand and sweep of each layer; sums; dA and dx; sums of chunks
    of_memory = Counter()
    for work in works:
        for array, size, _ in work.accesses:
            of_memory[array] += size
    x, y = 1024 * 1024 * 2, 1024 * sum(outs) * 2
    assert [of_memory[array] for array in ("x", "dx", "y", "dy")] == [2 * x, x, y, y]
    assert [work.bytes for work in sums_of_dx(layers)] == (len(outs) - 1) * [3 * x]
    alone = [*kernel_work.grouped_lora(layers[0], TWO)]
    assert sum(w.bytes for w in kernel_work.sibling_lora(layers[:1], TWO)) == pytest.approx(
        sum(w.bytes for w in alone), rel=0.01
    )


def test_a_gap_is_all_of_the_time():
    for kernels, options in roofline.OURS.values():
        layer = Layer(2048, 5504, **options)
        works = kernels(layer, Gpu())
        assert sum(roofline.gap(layer, works, Gpu()).values()) == pytest.approx(sum(w.seconds(Gpu()) for w in works))


PLAN = r"""
#include <cstdio>
#include "cuda/plan.h"
int main() {
  for (int sms : {2, 114, 132}) for (long t : {100L, 2048L, 8192L, 65536L}) for (long r : {8, 16, 17, 40, 65})
    for (long n : {576, 2048, 3072}) for (long m : {512, 5504, 8192, 8320, 8321, 11008}) {
      const auto p = align::cuda::plan(t, n, m, r, 1, 2, {sms, 9, 227 << 10});
      std::printf("%d %ld %ld %ld %ld %ld %ld %ld %ld %ld %d %ld %ld\n", sms, t, r, n, m, long(p.shrink.splits),
                  long(p.expand.splits), long(p.shrink_dy.splits), long(p.expand_dx.splits),
                  long(p.padded_rank * p.rank_chunks), int(p.one_pass), long(align::cuda::outer_chunks(t, 1, r)),
                  long(align::cuda::sweep_blocks(m, 2)));
    }
}
"""


def test_the_plan_is_that_of_the_kernels(tmp_path):
    (tmp_path / "plan.cpp").write_text(PLAN)
    command = ["c++", "-std=c++17", "-I", ROOT / "csrc", tmp_path / "plan.cpp", "-o", tmp_path / "plan"]
    subprocess.run(command, check=True)
    lines = subprocess.run([tmp_path / "plan"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 3 * 4 * 5 * 3 * 6
    for line in lines:
        sms, tokens, rank, n, m, *planned = map(int, line.split())
        layer, gpu = Layer(n, m, tokens=tokens, rank=rank), Gpu(multiprocessors=sms)
        of_x, of_y = (kernel_work.splits(cols, layer.tiles, gpu) for cols in (n, m))
        shrink = kernel_work.splits(n, layer.tiles, gpu, most=8)
        passes, chunks = kernel_work.one_pass(layer), -(-tokens // kernel_work.outer_rows(rank))
        sweep = -(-m // kernel_work.SWEEP_COLS)
        assert planned == [shrink, of_y, of_y, of_x, kernel_work.padded(rank), passes, chunks, sweep], line


class BytesOfOperators(TorchDispatchMode):
    """What every operator that is no view reads and writes."""

    def __init__(self):
        super().__init__()
        self.bytes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if not function.is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            self.bytes.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return out


@pytest.mark.parametrize(
    ("count", "site", "router"), [(1, "input", False), (5, "latent", False), (5, "latent", True), (5, "input", True)]
)
def test_the_loops_are_the_operations_of_the_baselines(count, site, router):
    # Without dropout, which has no kernel of its own on this device; every operation but those on small tensors.
    tokens, n, m = 4096, 1024, 2048
    on = {"device": "meta", "dtype": torch.bfloat16}
    base = nn.Linear(n, m, bias=False, **on).requires_grad_(False)
    layer = LoopedHeads(base, Sizes(tokens=tokens, heads=count, dropout_p=0.0), on["dtype"], site=site, router=router)
    x, dy = torch.empty(tokens, n, requires_grad=True, **on), torch.empty(tokens, m, **on)
    with BytesOfOperators() as counted:
        layer(x).backward(dy)
    big = 2 * tokens * n
    products = 2 * [2 * (tokens * n + n * m + tokens * m)]  # the base's
    model = loop(Layer(n, m, tokens=tokens, heads=count, site=site, router=router), Gpu())
    wanted = [work.bytes for work in model if not work.name.startswith("dropout") and work.bytes >= big]
    assert Counter(size for size in counted.bytes if size >= big) == Counter(wanted + products)


def test_masks_of_each_head_cost_as_many_masks():
    def tiles(site, heads_count):
        shrink, *_, last, _ = heads(Layer(1024, 512, heads=heads_count, site=site), Gpu())
        return shrink.blocks[0].tile, last.blocks[0], last.blocks[-1].tile

    shrink, d_a, dx = tiles("input", 5)
    without, _, dx_without = tiles("none", 5)
    mask, dx_mask = shrink.plus(without, -1), dx.plus(dx_without, -1)
    # One rank or forty of x, padded to 16 and 64.
    each, d_a_each, dx_each = tiles("input_per_head", 5)
    rows = kernel_work.tile_work_of(90, "shrink", 64)
    assert each == rows["tile"].plus(rows["piece"]).plus(rows["mask"], 5)
    assert mask == kernel_work.tile_work_of(90, "shrink", 16)["mask"]
    assert dx_each == pytest.approx(dx_without.plus(dx_mask, 5))
    assert d_a.tiles == d_a_each.tiles == 2 * 4  # of a chunk of 512 rows
    # Beside dB and dx of forty ranks.
    assert d_a.tile == kernel_work.tile(Gpu(), "outer", 40, 1)
    assert d_a_each.tile == kernel_work.tile(Gpu(), "outer", 40, 5)
