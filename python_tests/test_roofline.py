"""The paper model of the CUDA kernels: its formulas are those of the plan, of the ledger of bytes and of the loops."""

import subprocess
from collections import Counter
from pathlib import Path

import kernel_work
import pytest
import roofline
import torch
from kernel_work import Access, Gpu, Layer, Work, grouped_lora, heads, loop
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
    page = (ROOT / "docs/performance.md").read_text()
    written = page.split(roofline.BEGIN)[1].split(roofline.END)[0].strip()
    assert written == roofline.tables(Gpu()), "python benchmarks/roofline.py --write docs/performance.md"


def test_a_kernel_takes_the_longest_of_its_limits_and_a_launch():
    gpu = Gpu(memory=1e9, hbm=0.5, tensor=1e9, ffma=4e9, launch=0.25)
    work = Work(
        "w", [Access("x", 10**9), Access("A", 10**9, 7)], tensor=10**9, ffma=10**9, integer=2 * 10**9, longest=3
    )
    limits = {"memory": 4, "tensor cores": 1, "FFMA": 0.25, "masks": 2, "one block": 3}
    assert work.limits(gpu) == limits
    assert work.seconds(gpu) == 4.25
    assert work.bytes_again == 6 * 10**9


def test_the_bytes_of_one_pass_over_dy_are_those_of_the_ledger():
    total = moved(grouped_lora(Layer(1024, 512, tokens=256, rank=8), TWO))
    x, y, latent = 256 * 1024 * 2, 256 * 512 * 2, 256 * 8 * 4
    # Two row tiles, two splits each way, four blocks of dy's columns and eight of x's.
    assert total["x"] == 2 * x
    assert (total["y_in"], total["y"], total["dy"]) == (y, y, y)
    assert (total["dx_in"], total["dx"]) == (x, x)
    assert total["z"] == (1 + 4) * latent
    assert total["partials"] + total["dz"] == (2 + 4 + 1 + 2 * 3 + 4 + 8 + 2) * latent
    assert total["A"] == 2 * 2 * 8 * 1024 * 2
    assert total["B"] == (2 + 1) * 8 * 512 * 2


def test_the_bytes_of_two_passes_over_dy_are_those_of_the_ledger():
    total = moved(grouped_lora(Layer(1024, 512, tokens=256, rank=32), TWO))
    assert total["dy"] == 2 * 256 * 512 * 2
    assert total["partials"] + total["dz"] == (2 + 2 + 1 + 2 * 3 + 2 + 8 + 2) * 256 * 32 * 4
    assert total["B"] == (2 + 2) * 32 * 512 * 2


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
    third = layer.router and layer.site != "latent"  # dropout on x, but not on the router's
    assert of_memory["x"] == (3 if third else 2) * x
    assert [of_memory[array] for array in ("y_in", "y", "dy", "dx_in", "dx")] == [y, y, 2 * y, x, x]


def test_operations_are_those_of_the_header():
    for gpu in (Gpu(), TWO):  # two passes over dy and one
        shrink, expand, *of_backward = grouped_lora(Layer(3072, 8192, rank=16), gpu)
        forward = 2 * 8192 * 16 * (3072 + 8192)
        assert shrink.tensor + expand.tensor == forward
        assert sum(work.tensor for work in of_backward) == 2 * forward


@pytest.mark.parametrize(("name", "launches"), [("lora, align_lora", 5), ("m_lora", 6), ("r_lora", 7), ("hydra", 7)])
def test_kernels_are_as_many_as_the_page_says(name, launches):
    kernels, options = roofline.OURS[name]
    assert len(kernels(Layer(2048, 5504, **options), Gpu())) == launches


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
      std::printf("%d %ld %ld %ld %ld %ld %ld %ld %ld %ld %d\n", sms, t, r, n, m, long(p.shrink.splits),
                  long(p.expand.splits), long(p.shrink_dy.splits), long(p.expand_dx.splits),
                  long(p.padded_rank * p.rank_chunks), int(p.one_pass));
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
        passes = kernel_work.one_pass(layer, gpu)
        assert planned == [shrink, of_y, of_y, of_x, kernel_work.padded(rank), passes], line


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


def test_masks_of_each_head_cost_as_many_philox_blocks():
    one, five = (heads(Layer(1024, 512, heads=5, site=site), Gpu()) for site in ("input", "input_per_head"))
    masks = 8192 * 1024 * 84 // 8  # ten rounds of six instructions and three for each of eight masks
    assert [work.integer for work in one if work.integer] == [masks, 2 * masks]
    assert [work.integer for work in five if work.integer] == [5 * masks, 10 * masks]
    assert five[-1].longest == pytest.approx(8192 * 128 * 5 * 84 / 8 / (67e12 / 4 / 132))
