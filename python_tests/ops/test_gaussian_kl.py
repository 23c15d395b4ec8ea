"""gaussian_kl: value and gradient against the literal sum over pairs in float64."""

import math
from functools import partial

import closeness
import pytest
import torch
from closeness import DRAWS
from task_ids import NOBODY_TO_COMPARE, assert_exactly_zero
from torch.library import opcheck

from align_ext import ops, reference
from align_ext.ops.gaussian_kl import gaussian_kl_backward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE, FLOAT64 = pytest.mark.needs("size"), pytest.mark.needs("float64")


def make(tokens, rank, tasks, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    task = torch.randint(-1, tasks, (tokens,), generator=g)
    z = torch.randn(tokens, rank, generator=g) * (1 + task[:, None] % 3) + task[:, None]
    return z.to(dtype), task


def run(op, z, task, tasks, dtype=None, device="cpu", **options):
    z = z.detach().clone().to(device, dtype or z.dtype).requires_grad_()
    loss = op(z, task.to(device), tasks, **options)
    (3 * loss).backward()
    return {"loss": loss.detach().cpu(), "dz": z.grad.cpu()}


compare = partial(closeness.compare_losses, run, ops.gaussian_kl, reference.gaussian_kl)


def test_a_hand_computed_case(device):
    # task 0: mean 1, var 1; task 1: mean 3, var 4. ¼ [1/4 + 4/1 - 2 + 2² (1 + 1/4)] = ¼ [2.25 + 5] = 1.8125
    z = torch.tensor([[0.0], [2.0], [1.0], [5.0], [99.0]], device=device)
    loss = ops.gaussian_kl(z, torch.tensor([0, 0, 1, 1, -1], device=device), 2, eps=1e-12)
    assert loss.item() == pytest.approx(1.8125, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rank", "tasks"),
    [(256, 8, 5), (301, 7, 3), (64, 70, 2), pytest.param(3000, 16, 25, marks=LARGE), (40, 1, 2)],
)
def test_value_and_gradient_match_the_literal_pairs(device, dtype, tokens, rank, tasks):
    compare(device, partial(make, tokens, rank, tasks, dtype), tasks, draws=4 if tokens > 1000 else DRAWS)


def make_alike(tokens, rank, tasks, samples, mean, seed=0):
    """Latents that differ by chance alone, whose gradient is a small difference of moments; samples: None, or many."""
    g = torch.Generator().manual_seed(seed)
    task = torch.randint(0, tasks, (samples or tokens,), generator=g).repeat_interleave(tokens // (samples or tokens))
    return torch.randn(tokens, rank, generator=g) + mean, task


@pytest.mark.parametrize(("samples", "mean"), [(None, 0.0), (8, 0.0), (None, 3.0), (8, 3.0)])
@pytest.mark.parametrize(("tokens", "rank", "tasks"), [(512, 8, 5), pytest.param(4096, 9, 3, marks=LARGE)])
def test_of_tasks_that_are_alike_the_gradient_is_as_exact(device, tokens, rank, tasks, samples, mean):
    compare(device, partial(make_alike, tokens, rank, tasks, samples, mean), tasks, draws=4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_task_that_takes_no_part_has_no_gradient_whatever_its_tokens_are(device, value):
    z, task = make(40, 8, 3)
    task[task == 2] = 1
    task[7], z[7] = 2, value  # one token is no population
    dz = run(ops.gaussian_kl, z, task, 3, device=device)["dz"]
    assert (dz[7] == 0).all()
    assert torch.isfinite(dz).all()
    assert dz.abs().sum() > 0


@pytest.mark.parametrize("pairs", ["sum", "mean"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_the_options_match_the_literal_pairs(device, pairs, ddof):
    compare(device, partial(make, 200, 6, 4), 4, pairs=pairs, ddof=ddof, eps=1e-3)


@NOBODY_TO_COMPARE
def test_fewer_than_two_active_tasks_give_exactly_zero(device, name, task, tasks):
    assert_exactly_zero(ops.gaussian_kl, device, name, task, tasks)


def test_a_constant_task_stays_finite(device):
    def inputs(seed):
        z, task = make(60, 4, 3, seed=seed)
        z[task == 1] = 0.5
        return z, task

    compare(device, inputs, 3)


def test_tokens_without_a_task_do_not_count(device):
    z, task = make(100, 4, 3)
    before = run(ops.gaussian_kl, z, task, 3, device=device)
    z[task == -1] = 1e6
    after = run(ops.gaussian_kl, z, task, 3, device=device)
    assert torch.equal(before["loss"], after["loss"])
    assert (after["dz"][task == -1] == 0).all()


def test_a_common_shift_changes_nothing(device):
    z, task = make(400, 8, 5)
    exact = run(reference.gaussian_kl, z, task, 5, torch.float64)
    shifted = (z.double() + 1e4).float()
    moved = run(ops.gaussian_kl, shifted, task, 5, device=device)
    same = run(reference.gaussian_kl, shifted, task, 5, torch.float64)
    assert moved["loss"].item() == pytest.approx(same["loss"].item(), rel=1e-4)
    assert moved["loss"].item() == pytest.approx(exact["loss"].item(), rel=2e-2)  # float32 cannot hold z + 1e4 better


def test_strided_views_are_read_as_they_are(device):
    z, task = make(90, 6, 3)
    wide = torch.stack([z, z + 1], dim=2).flatten(1).to(device).requires_grad_()  # z is every second column
    dense = run(ops.gaussian_kl, z, task, 3, device=device)
    loss = ops.gaussian_kl(wide[:, ::2], task.to(device).repeat_interleave(2)[::2], 3)
    (3 * loss).backward()
    assert torch.equal(loss.detach().cpu(), dense["loss"])
    assert torch.equal(wide.grad[:, ::2].cpu(), dense["dz"])
    assert (wide.grad[:, 1::2] == 0).all()


def test_no_tokens_give_empty_moments_and_no_gradient(device):
    z = torch.zeros(0, 4, device=device, requires_grad=True)
    moments = ops.task_moments(z, torch.zeros(0, dtype=torch.int64, device=device), 3)
    moments.sum().backward()
    assert torch.equal(moments.cpu(), torch.zeros(3, 9))
    assert z.grad.shape == (0, 4)


def test_relabelling_the_tasks_changes_nothing(device):
    z, task = make(300, 8, 4)
    new = torch.tensor([2, 0, 3, 1])
    relabelled = torch.where(task < 0, task, new[task.clamp_min(0)])
    a, b = (run(ops.gaussian_kl, z, ids, 4, device=device) for ids in (task, relabelled))
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(a["dz"], b["dz"], rtol=1e-4, atol=1e-6)


def test_the_gradient_sums_to_zero_over_the_tokens(device):
    z, task = make(500, 8, 5)
    dz = run(ops.gaussian_kl, z, task, 5, device=device)["dz"]
    assert dz.sum(0).abs().max() < 1e-4 * dz.abs().sum(0).max()


# ---- Statistics of each position


def make_batch(samples, positions, rank, tasks, dtype=torch.float32, seed=0):
    z, _ = make(samples * positions, rank, tasks, dtype, seed)
    return z.view(samples, positions, rank), torch.arange(samples) % (tasks + 1) - 1  # the first sample counts nowhere


def test_a_hand_computed_case_of_two_positions(device):
    # Over the samples, ddof 1. Position 0: task 0 {0, 2}: mean 1, var 2; task 1 {1, 5}: mean 3, var 8:
    # ¼ [2/8 + 8/2 - 2 + 2² (1/2 + 1/8)] = ¼ [2.25 + 2.5] = 1.1875. Position 1: both {0, 2}, but task 1 moved by 1:
    # ¼ [1 + 1 - 2 + 1² (1/2 + 1/2)] = ¼. The mean of the two positions: 0.71875.
    z = torch.tensor([[[0.0], [0.0]], [[1.0], [1.0]], [[99.0], [-9.0]], [[2.0], [2.0]], [[5.0], [3.0]]], device=device)
    task = torch.tensor([0, 1, -1, 0, 1], device=device)
    loss = ops.gaussian_kl(z, task, 2, eps=1e-12, statistics="position")
    assert loss.item() == pytest.approx(0.71875, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("samples", "positions", "rank", "tasks"), [(16, 5, 3, 3), (12, 1, 4, 2), (40, 33, 8, 5)])
def test_statistics_of_positions_match_the_loop_over_them(device, dtype, samples, positions, rank, tasks):
    batch, draws = partial(make_batch, samples, positions, rank, tasks, dtype), 4 if positions > 30 else DRAWS
    compare(device, batch, tasks, draws=draws, statistics="position")


@pytest.mark.parametrize("options", [{"pairs": "sum"}, {"ddof": 0}, {"ddof": 0, "pairs": "sum", "eps": 1e-2}])
def test_statistics_of_positions_take_the_other_options_too(device, options):
    compare(device, partial(make_batch, 20, 4, 3, 4), 4, statistics="position", **options)


def test_statistics_of_one_position_are_those_of_tokens_with_the_released_options(device):
    z, task = (t.to(device) for t in make_batch(20, 1, 6, 3))
    loss = ops.gaussian_kl(z, task, 3, statistics="position")
    assert torch.equal(loss, ops.gaussian_kl(z[:, 0], task, 3, ddof=1, pairs="mean"))


@FLOAT64
def test_gradcheck_of_the_statistics_of_positions():
    z, task = make_batch(10, 3, 2, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda z: ops.gaussian_kl(z, task, 3, statistics="position"), z.requires_grad_())


def test_batches_that_have_no_positions_are_refused_with_the_cure(device):
    z, task = (t.to(device) for t in make_batch(6, 4, 2, 2))
    for bad_z, bad_task in [(z.flatten(0, 1), task), (z, task.repeat_interleave(4)), (z[None], task)]:
        with pytest.raises(ValueError, match=r"one id a sample, got .* z\.view\(B, S, rank\)"):
            ops.gaussian_kl(bad_z, bad_task, 2, statistics="position")
    with pytest.raises(ValueError, match='statistics must be "token" or "position"'):
        ops.gaussian_kl(z, task, 2, statistics="sample")


# ---- The operator


@FLOAT64
@pytest.mark.parametrize("ddof", [0, 1])
def test_gradcheck(ddof):
    z, task = make(30, 3, 3)
    assert torch.autograd.gradcheck(
        lambda z: ops.gaussian_kl(z, task, 3, ddof=ddof, pairs="mean"), z.double().requires_grad_()
    )


def test_opcheck(device):
    z, task = (t.to(device) for t in make(30, 3, 3))
    opcheck(torch.ops.align_ext.gaussian_kl.default, (z.requires_grad_(), task, 3, 1e-6, 0, False))
    layers = [z.detach(), torch.randn(30, 2).to(device)]
    moments = ops.task_moments(layers, task, 3)
    leaves = [layer.clone().requires_grad_() for layer in layers]
    opcheck(torch.ops.align_ext.task_moments.default, (leaves, task, 3, 4))
    opcheck(torch.ops.align_ext.gaussian_kl_tables.default, (moments, 1e-6, 0, True))
    tables = ops.gaussian_kl_tables(moments)[1]
    layers, task = [torch.cat([layer, layer[:2]]) for layer in layers], torch.cat([task, task[:2]])  # nothing is padded
    opcheck(torch.ops.align_ext.gaussian_kl_backward.default, (z.new_ones(()), 2.0, [layers[0]] * 2, task, tables))


def test_compiles_without_a_graph_break(device):
    z, task = (t.to(device) for t in make(64, 4, 3))
    compiled = torch.compile(lambda z: ops.gaussian_kl(z, task, 3) * 2, fullgraph=True, backend="aot_eager")
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(a).backward()
    (ops.gaussian_kl(b, task, 3) * 2).backward()
    assert torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("op", [ops.gaussian_kl, ops.task_moments])
def test_a_second_derivative_is_refused(device, op):
    z, task = (t.to(device) for t in make(40, 3, 3))
    loss = op(z.requires_grad_(), task, 3).sum()
    with pytest.raises(RuntimeError, match=f"{op.__name__} cannot be differentiated twice"):
        torch.autograd.grad(loss, z, create_graph=True)


@LARGE
def test_the_same_bits_for_any_number_of_threads(device):
    z, task = (t.to(device) for t in make(20000, 8, 5))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            leaf = z.clone().requires_grad_()
            moments = ops.task_moments(leaf, task, 5)
            moments.square().sum().backward()
            dz = run(ops.gaussian_kl, z, task, 5, device=device)["dz"]
            results.append((moments.detach(), dz, leaf.grad))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_bad_arguments_are_named(device):
    z, task = torch.zeros(4, 2, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match="pairs must be"):
        ops.gaussian_kl(z, task, 2, pairs="all")
    with pytest.raises(ValueError, match="ddof must be 0 or 1"):
        ops.gaussian_kl(z, task, 2, ddof=2)
    with pytest.raises(ValueError, match=r"num_tasks must be an integer in 1 \.\. 65536, got 0"):
        ops.gaussian_kl(z, task, 0)
    with pytest.raises(RuntimeError, match="task must have shape"):
        ops.gaussian_kl(z, task[:3], 2)
    with pytest.raises(RuntimeError, match="task must be int64"):
        ops.gaussian_kl(z, task.int(), 2)
    with pytest.raises(RuntimeError, match="z must be"):
        ops.gaussian_kl(z[0], task, 2)
    with pytest.raises(RuntimeError, match="z must hold the latent of one layer"):
        ops.task_moments([], task, 2)
    with pytest.raises(RuntimeError, match="z of every layer must have shape"):
        ops.task_moments([z, z[:3]], task, 2)
    with pytest.raises(RuntimeError, match="must have the same dtype"):
        ops.task_moments([z, z.half()], task, 2)
    with pytest.raises(RuntimeError, match="room for rank 1"):
        ops.task_moments(z, task, 2, rank=1)
    with pytest.raises(RuntimeError, match="tables must be"):
        gaussian_kl_backward(z.new_ones(()), [z], task, z.new_ones(2, 3, 6))
    assert math.isfinite(ops.gaussian_kl(z, task, 2).item())
