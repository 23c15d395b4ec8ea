"""mk_mmd: value and gradient against the literal sum over pairs in float64."""

import itertools
import math
from functools import partial

import closeness
import pytest
import torch
from closeness import DRAWS
from task_ids import NOBODY_TO_COMPARE, assert_exactly_zero
from torch.library import opcheck

from align_ext import ops, reference
from align_ext.ops.mk_mmd import mk_mmd_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LARGE, FLOAT64 = pytest.mark.needs("size"), pytest.mark.needs("float64")


def make(tokens, rank, tasks, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    task = torch.randint(-1, tasks + 1, (tokens,), generator=g)  # -1 and tasks do not count
    z = torch.randn(tokens, rank, generator=g) * (1 + 0.2 * (task[:, None] % 3)) + 0.3 * task[:, None]
    return z.to(dtype), task


def run(op, z, task, tasks, dtype=None, device="cpu", **options):
    z = z.detach().clone().to(device, dtype or z.dtype).requires_grad_()
    loss = op(z, task.to(device), tasks, **options)
    (3 * loss).backward()  # not the last node
    return {"loss": loss.detach().cpu(), "dz": z.grad.cpu()}


compare = partial(closeness.compare_losses, run, ops.mk_mmd, reference.mk_mmd)


def literal(z, task, tasks, betas, n_max=256, statistic="v"):
    """The definition, token pair by token pair."""
    members = [[t for t in range(len(z)) if task[t] == i] for i in range(tasks)]
    members = [[m[j * len(m) // n_max] for j in range(n_max)] if len(m) > n_max else m for m in members]

    def k(a, b):
        return sum(torch.exp(-beta * ((z[a] - z[b]) ** 2).sum()) for beta in betas)

    def within(m):
        if statistic == "v":
            return sum(k(a, b) for a in m for b in m) / len(m) ** 2
        return sum(k(a, b) for a in m for b in m if a != b) / (len(m) * (len(m) - 1))

    def between(m, n):
        return sum(k(a, b) for a in m for b in n) / (len(m) * len(n))

    return sum(within(m) + within(n) - 2 * between(m, n) for m, n in itertools.combinations(members, 2))


# ---- The definition


@pytest.mark.parametrize(("statistic", "within_task_0"), [("v", 3 / 4), ("u", 1 / 2)])
def test_a_hand_computed_case(device, statistic, within_task_0):
    # One kernel, k = 2^(-d²). Task 0 holds 0 and 1, within it V is (1 + ½ + ½ + 1) / 4, U is ½. Task 1 holds 3 and 3:
    # within it both are 1. Between them: (2 2^-9 + 2 2^-4) / 4. A token of no task lies among them.
    z = torch.tensor([[0.0], [3.0], [99.0], [1.0], [3.0]], device=device)
    task = torch.tensor([0, 1, -1, 0, 1], device=device)
    loss = ops.mk_mmd(z, task, 2, bandwidths=[1 / math.log(2)], statistic=statistic)
    assert loss.item() == pytest.approx(within_task_0 + 1 - 2 * (2**-10 + 2**-5), rel=1e-6)


@pytest.mark.parametrize("statistic", ["v", "u"])
def test_the_reference_is_the_definition(statistic):
    z, task = make(24, 2, 3)
    z = z.double().requires_grad_()
    options = {"statistic": statistic, "n_max": 4}
    chosen = torch.cat([z[task == i][[j * n // 4 for j in range(4)] if n > 4 else slice(None)]
                        for i, n in enumerate((task == i).sum().item() for i in range(3))])  # fmt: skip
    d2 = ((chosen[:, None] - chosen[None]) ** 2).sum(-1).detach()
    bw = d2.sum() / (len(chosen) * (len(chosen) - 1))
    betas = [1 / (bw * 2.0 ** (k - 2)) for k in range(5)]
    expected = literal(z, task, 3, betas, **options)
    (expected_dz,) = torch.autograd.grad(expected, z)
    actual = reference.mk_mmd(z, task, 3, **options)
    (dz,) = torch.autograd.grad(actual, z)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(dz, expected_dz, rtol=1e-10, atol=1e-14)


# ---- Value and gradient


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "rank", "tasks"),
    [(160, 8, 5), (131, 7, 3), (64, 70, 2), pytest.param(2000, 16, 12, marks=LARGE), (40, 1, 2), (100, 64, 4)],
)
def test_value_and_gradient_match_the_literal_pairs(device, dtype, tokens, rank, tasks):
    compare(device, partial(make, tokens, rank, tasks, dtype), tasks, draws=4 if tokens > 1000 else DRAWS)


@pytest.mark.parametrize("pairs", ["sum", "mean"])
@pytest.mark.parametrize("statistic", ["v", "u"])
@pytest.mark.parametrize("bandwidths", ["heuristic", [4.0], [0.5, 1, 2, 4, 8, 16, 32, 64], [30.0, 0.1, 1.0, 7.0]])
def test_the_options_match_the_literal_pairs(device, pairs, statistic, bandwidths):
    compare(device, partial(make, 100, 6, 4), 4, pairs=pairs, statistic=statistic, bandwidths=bandwidths)


@pytest.mark.parametrize("num_kernels", [1, 2, 4, 9])
def test_the_heuristic_makes_any_number_of_kernels(device, num_kernels):
    compare(device, partial(make, 80, 3, 3), 3, num_kernels=num_kernels)


def test_the_bandwidths_of_the_released_code_work(device):
    compare(device, partial(make, 80, 8, 3), 3, bandwidths=[10.0**e for e in range(-6, 7)])


@pytest.mark.parametrize("n_max", [2, 7, 33])
def test_no_more_than_n_max_tokens_of_a_task_take_part(device, n_max):
    def inputs(seed=0):
        z, task = make(200, 5, 3, seed=seed)
        task[task == 1] = torch.where(torch.arange(200)[task == 1] > 30, -1, 1)  # task 1 has fewer than 33 tokens
        return z, task

    compare(device, inputs, 3, n_max=n_max)
    z, task = inputs()
    dz = run(ops.mk_mmd, z, task, 3, device=device, n_max=n_max)["dz"]
    for i in range(3):
        tokens = torch.nonzero(task == i).flatten().tolist()
        n = len(tokens)
        chosen = {tokens[j * n // n_max] for j in range(n_max)} if n > n_max else set(tokens)
        assert chosen == {t for t in tokens if (dz[t] != 0).any()}


def test_clusters_far_apart_keep_their_gradients(device):
    def apart(seed):
        z, task = make(120, 4, 3, seed=seed)
        return 1e-3 * z + 5 * (task[:, None] % 3), task

    def far_away(seed):
        z, task = make(120, 4, 3, seed=seed)
        return z + 300, task

    compare(device, apart, 3)
    compare(device, far_away, 3, bandwidths=[1.0, 2.0])


@pytest.mark.parametrize("rank", [8, 20])
@pytest.mark.parametrize("options", [{"bandwidths": [1e-6, 1.0]}, {"num_kernels": 24}, {}])
def test_near_tokens_keep_their_gradients(device, rank, options):
    def inputs(seed):
        # Samples that share a prompt share latents: equal ones, and others 1e-3 apart, which narrow kernels weigh most.
        z, task = make(120, rank, 3, seed=seed)
        z[60:] = z[:60] + 1e-3 * torch.randn(60, rank, generator=torch.Generator().manual_seed(~seed))
        z[100:110] = z[:10]
        return z, task

    compare(device, inputs, 3, **options)


@pytest.mark.parametrize(("tokens", "rank", "tasks"), [(40, 1, 2), (30, 2, 3), (60, 12, 3)])
def test_kernels_that_are_squares_of_others_round_little_more_than_torchs(device, tokens, rank, tasks):
    """Without the two roundings that the rule adds, which would hide it: narrow kernels have 16 times the weight."""
    errors = []
    for seed in range(30):
        z, task = make(tokens, rank, tasks, seed=seed)
        runs = ((ops.mk_mmd, None, device), (reference.mk_mmd, None, "cpu"), (reference.mk_mmd, torch.float64, "cpu"))
        actual, same, exact = (run(op, z, task, tasks, dtype, of)["dz"] for op, dtype, of in runs)
        errors.append(torch.stack([(of.double() - exact).norm() / exact.norm() for of in (actual, same)]))
    ours, torchs = torch.stack(errors).square().mean(0).sqrt().tolist()
    print(f"error {ours:.2e}, plain torch {torchs:.2e}")
    assert ours < 1.6 * torchs


# ---- Nobody to compare


@NOBODY_TO_COMPARE
def test_fewer_than_two_tasks_give_exactly_zero(device, name, task, tasks):
    assert_exactly_zero(ops.mk_mmd, device, name, task, tasks)


@pytest.mark.parametrize(("rank", "value"), [(4, 0.1), (1, 7.0), (0, 0.0)])
def test_a_constant_latent_gives_exactly_zero(device, rank, value):
    z, task = torch.full((50, rank), value), torch.arange(50) % 3
    result = run(ops.mk_mmd, z, task, 3, device=device)
    assert result["loss"] == 0
    assert (result["dz"] == 0).all()


def test_an_empty_task_changes_nothing(device):
    z, task = make(90, 4, 3)
    task[task == 3] = -1
    few, many = (run(ops.mk_mmd, z, task, tasks, device=device) for tasks in (3, 9))
    assert torch.equal(few["loss"], many["loss"])
    assert torch.equal(few["dz"], many["dz"])


def test_tokens_without_a_task_do_not_count(device):
    z, task = make(100, 4, 3)
    before = run(ops.mk_mmd, z, task, 3, device=device)
    z[(task == -1) | (task == 3)] = math.nan
    after = run(ops.mk_mmd, z, task, 3, device=device)
    assert torch.equal(before["loss"], after["loss"])
    assert torch.equal(before["dz"], after["dz"])


# ---- Invariances


def test_the_gradient_sums_to_zero_over_the_tokens(device):
    z, task = make(300, 8, 5)
    dz = run(ops.mk_mmd, z, task, 5, device=device)["dz"]
    assert dz.sum(0).abs().max() < 1e-5 * dz.abs().sum(0).max()


@pytest.mark.parametrize("seed", range(5))
def test_the_v_statistic_is_not_negative(device, seed):
    task = torch.arange(120) % 3
    alike = torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)).repeat_interleave(3, 0)
    assert abs(run(ops.mk_mmd, alike, task, 3, device=device)["loss"]) < 1e-6
    z, task = make(120, 3, 3, seed=seed)
    assert run(ops.mk_mmd, z, task, 3, device=device)["loss"] > 0


def test_relabelling_the_tasks_changes_nothing(device):
    z, task = make(200, 8, 4)
    new = torch.tensor([2, 0, 3, 1, 4])
    relabelled = torch.where(task < 0, task, new[task.clamp_min(0)])
    a, b = (run(ops.mk_mmd, z, ids, 4, device=device) for ids in (task, relabelled))
    torch.testing.assert_close(a["loss"], b["loss"], rtol=1e-6, atol=0)
    torch.testing.assert_close(a["dz"], b["dz"], rtol=1e-4, atol=1e-8)


def test_the_gradient_is_a_direction_of_descent(device):
    z, task = make(200, 4, 3)
    before = run(ops.mk_mmd, z, task, 3, device=device)
    after = run(ops.mk_mmd, z - 0.5 * before["dz"] / before["dz"].norm(), task, 3, device=device)
    assert after["loss"] < before["loss"]


@pytest.mark.parametrize("rank", [6, 16])
def test_a_common_shift_changes_nothing(device, rank):
    z, task = make(200, rank, 4)
    z = torch.round(z * 2**8) / 2**8  # so that float32 holds z + 1e4 as well
    a, b = (run(ops.mk_mmd, moved, task, 4, device=device) for moved in (z, z + 1e4))
    torch.testing.assert_close(b["loss"], a["loss"], rtol=1e-5, atol=0)
    assert (b["dz"] - a["dz"]).abs().max() < 1e-5 * a["dz"].abs().max()


def test_many_tasks_match_the_literal_pairs(device):
    compare(device, partial(make, 260, 8, 25), 25, draws=4)


def test_strided_views_are_read_as_they_are(device):
    z, task = make(90, 6, 3)
    wide = torch.stack([z, z + 1], dim=2).flatten(1).to(device)  # z is every second column
    dense = run(ops.mk_mmd, z, task, 3, device=device)
    strided = ops.mk_mmd(wide[:, ::2], task.to(device).repeat_interleave(2)[::2], 3)
    assert torch.equal(strided.cpu(), dense["loss"])


# ---- The operator


@FLOAT64
@pytest.mark.parametrize("statistic", ["v", "u"])
def test_gradcheck(statistic):
    z, task = make(24, 3, 3)
    for op in (ops.mk_mmd, reference.mk_mmd):  # of given bandwidths, for the heuristic's are constants to the gradient
        assert torch.autograd.gradcheck(
            lambda z, op=op: op(z, task, 3, statistic=statistic, bandwidths=[1.0, 2.0, 5.0], pairs="mean"),
            z.double().requires_grad_(),
        )


@FLOAT64
def test_float64_is_exact(device):
    z, task = make(150, 9, 4)
    actual = run(ops.mk_mmd, z, task, 4, torch.float64)
    exact = run(reference.mk_mmd, z, task, 4, torch.float64)
    torch.testing.assert_close(actual["loss"], exact["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(actual["dz"], exact["dz"], rtol=1e-10, atol=1e-16)


def test_opcheck(device):
    z, task = (t.to(device) for t in make(40, 3, 3))
    layers = [z.clone().requires_grad_(), z[:, :2]]
    opcheck(torch.ops.align_ext.mk_mmd.default, (layers, task, 3, [], 5, False, 8, False))
    opcheck(torch.ops.align_ext.mk_mmd.default, ([z], task, 3, [1.0, 3.0], 5, True, 256, True))
    _, gradient, slot = torch.ops.align_ext.mk_mmd([z, z[:, :2]], task, 3, [], 5, False, 8, False)
    opcheck(torch.ops.align_ext.mk_mmd_backward.default, (z.new_ones(2), gradient, slot, torch.bfloat16))


def test_compiles_without_a_graph_break(device):
    z, task = (t.to(device) for t in make(64, 4, 3))
    compiled = torch.compile(lambda z: ops.mk_mmd(z, task, 3) * 2, fullgraph=True, backend="aot_eager", dynamic=True)
    a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
    compiled(a).backward()
    (ops.mk_mmd(b, task, 3) * 2).backward()
    assert torch.equal(a.grad, b.grad)


def test_no_more_than_the_rows_that_take_part_is_kept_for_backward(device):
    z, task = (t.to(device) for t in make(500, 4, 2))
    _, gradient, slot = mk_mmd_rows([z, z[:, :3]], task, 2, n_max=16)
    assert gradient.shape == (2, 32, 4)
    assert not gradient[1, :, 3].any()
    assert slot.dtype == torch.int32
    assert sorted(slot[slot >= 0].tolist()) == list(range(32))


def test_a_second_derivative_is_refused(device):
    z, task = (t.to(device) for t in make(40, 3, 3))
    loss = ops.mk_mmd(z.requires_grad_(), task, 3)
    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        torch.autograd.grad(loss, z, create_graph=True)


@LARGE
def test_the_same_bits_for_any_number_of_threads(device):
    z, task = make(3000, 12, 5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(ops.mk_mmd, z, task, 5, device=device))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result["loss"], results[0]["loss"])
        assert torch.equal(result["dz"], results[0]["dz"])


@LARGE
def test_a_million_tokens_work(device):
    def inputs(seed):
        g = torch.Generator().manual_seed(seed)
        return torch.randn(10**6, 4, generator=g), torch.randint(0, 3, (10**6,), generator=g)

    compare(device, inputs, 3, draws=4, n_max=64)


def test_bad_arguments_are_named(device):
    z, task = torch.zeros(4, 2, device=device), torch.zeros(4, dtype=torch.int64, device=device)
    for options, message in [
        ({"pairs": "all"}, "pairs must be"),
        ({"statistic": "w"}, "statistic must be"),
        ({"n_max": 1}, "n_max must be an integer in 2 .. "),
        ({"num_kernels": 0}, "num_kernels must be an integer in 1 .. 32"),
        ({"num_tasks": 0}, "num_tasks must be an integer in 1 .. 65536, got 0"),
        ({"bandwidths": "median"}, "bandwidths must be"),
        ({"bandwidths": []}, "bandwidths must be"),
        ({"bandwidths": [1.0, 0.0]}, "bandwidths must be"),
    ]:
        with pytest.raises(ValueError, match=message):
            ops.mk_mmd(z, task, **{"num_tasks": 2, **options})
    for arguments, message in [
        ((z, task[:3], 2), "task must have shape"),
        ((z, task.int(), 2), "task must be int64"),
        ((z[0], task, 2), "z must be"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            ops.mk_mmd(*arguments)
