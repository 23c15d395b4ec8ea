"""The moments of gaussian_kl, an operator of their own, and several layers in one call."""

import pytest
import torch
from closeness import assert_as_close_as_torch
from ops.test_gaussian_kl import DTYPES, FLOAT64, LARGE, make, run

from align_ext import ops, reference
from align_ext.ops.gaussian_kl import gaussian_kl_backward


def layers_of_ranks(ranks, tokens, tasks=4, dtype=torch.float32):
    z, task = make(tokens, sum(ranks), tasks, dtype)
    return z.split(ranks, dim=1), task  # strided


@LARGE
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float64, marks=FLOAT64)])
def test_moments_match_the_reference(device, dtype):
    z, task = make(5000, 9, 4, dtype)
    actual = ops.task_moments(z.to(device), task.to(device), 4).cpu()
    exact = reference.task_moments(z.double(), task, 4)
    assert torch.equal(actual[:, 0].double(), exact[:, 0])
    assert_as_close_as_torch(actual[:, 1:], reference.task_moments(z, task, 4)[:, 1:], exact[:, 1:])


def moments_gradients(op, layers, task, tasks, weights, dtype=None):
    """d(Σ weights * moments) / dz of each layer."""
    layers = [layer.detach().to(dtype or layer.dtype).requires_grad_() for layer in layers]
    moments = op(layers, task, tasks)
    return torch.autograd.grad((weights.to(moments) * moments).sum(), layers)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [[6], [3, 8, 1]])
def test_gradients_of_moments_match_the_reference(device, ranks, dtype):
    layers, task = layers_of_ranks(ranks, 300, 4, dtype)
    task[task == 2] = -1  # a task without tokens
    weights = torch.randn(len(ranks), 4, 2 * max(ranks) + 1, generator=torch.Generator().manual_seed(1))
    actual = moments_gradients(ops.task_moments, [z.to(device) for z in layers], task.to(device), 4, weights)
    same = moments_gradients(reference.task_moments, layers, task, 4, weights)
    exact = moments_gradients(reference.task_moments, layers, task, 4, weights, torch.float64)
    for i in range(len(ranks)):
        assert_as_close_as_torch(actual[i].cpu(), same[i], exact[i])
        assert (actual[i][task == -1] == 0).all()


@FLOAT64
def test_gradcheck_of_moments():
    layers, task = layers_of_ranks([3, 1], 12, 3, torch.float64)
    leaves = [layer.clone().requires_grad_() for layer in layers]
    assert torch.autograd.gradcheck(lambda *z: ops.task_moments(z, task, 3), leaves)
    assert torch.autograd.gradcheck(lambda z: ops.task_moments(z, task, 3, rank=5), leaves[0])


def test_the_moments_of_all_layers_are_one_native_call_in_forward_and_one_in_backward(device):
    layers, task = layers_of_ranks([3, 8, 1], 50)
    leaves, task = [layer.to(device).requires_grad_() for layer in layers], task.to(device)
    with torch.autograd.profiler.profile() as profile:
        torch.autograd.grad(ops.task_moments(leaves, task, 4).sum(), leaves)
    calls = [event.name for event in profile.function_events if event.name.startswith("align_ext::")]
    assert calls == ["align_ext::task_moments", "align_ext::gaussian_kl_backward"]


def literal_from_moments(moments, rank, eps=1e-6):
    """The closed form (docs/numerics.md) of merged moments, all tasks active, by plain autograd."""
    n, mean, m2 = moments.split([1, rank, rank], dim=1)
    v, c = m2 / n + eps, mean - mean.mean(0)
    p, vb = 1 / v, v.mean(0)
    tasks = len(moments)
    terms = tasks / vb * ((v - vb) ** 2 * p).sum(0) + tasks * (p * c * c).sum(0) + p.sum(0) * (c * c).sum(0)
    return terms.sum() / 4


@FLOAT64
def test_a_loss_on_merged_moments_has_the_gradient_of_gaussian_kl():
    from align_ext.losses.kl import merge_moments  # it needs more than torch, and the operators' tests do not

    z, task = make(200, 6, 4, torch.float64)
    leaf = z.clone().requires_grad_()
    parts = [ops.task_moments(leaf[rows], task[rows], 4) for rows in (slice(0, 70), slice(70, 71), slice(71, None))]
    loss = literal_from_moments(merge_moments(merge_moments(parts[0], parts[1]), parts[2]), 6)
    (3 * loss).backward()
    whole = run(ops.gaussian_kl, z, task, 4)
    torch.testing.assert_close(loss.detach(), whole["loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(leaf.grad, whole["dz"], rtol=1e-9, atol=1e-13)


def test_moments_compile_without_a_graph_break(device):
    layers, task = layers_of_ranks([3, 2], 64)
    task = task.to(device)

    def loss(*z):
        moments = ops.task_moments([t * 2 for t in z], task, 4)
        return (moments[..., 1:] ** 2).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    grads = []
    for call in (compiled, loss):
        leaves = [layer.to(device).requires_grad_() for layer in layers]
        grads.append(torch.autograd.grad(call(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [[6], [6, 6, 6], [3, 8, 1], [2] * 300])
def test_layers_of_any_ranks_in_one_call_give_what_each_gives_alone(device, ranks, dtype):
    tasks, rank = 4, max(ranks)
    layers, task = layers_of_ranks(ranks, 40 if len(ranks) > 100 else 200, tasks, dtype)
    layers, task = [layer.to(device) for layer in layers], task.to(device)
    moments = ops.task_moments(layers, task, tasks)
    loss, tables = ops.gaussian_kl_tables(moments)
    dz = gaussian_kl_backward(torch.tensor(2.0, device=device), layers, task, tables, scale=1.5)
    assert moments.shape == (len(ranks), tasks, 2 * rank + 1)
    for i in {0, len(ranks) // 2, len(ranks) - 1}:
        alone = run(ops.gaussian_kl, layers[i], task, tasks, device=device)  # whose d_loss is 3
        assert dz[i].is_contiguous()
        for actual, expected in ((dz[i].cpu(), alone["dz"]), (loss[i].cpu(), alone["loss"])):
            assert actual.shape == expected.shape
            assert (actual - expected).abs().max() <= 8 * torch.finfo(expected.dtype).eps * expected.abs().max()
        own = ops.task_moments(layers[i], task, tasks, rank=rank)
        torch.testing.assert_close(moments[i], own, rtol=1e-5, atol=1e-5)
        assert (own[:, 1:].unflatten(1, (2, rank))[..., ranks[i] :] == 0).all()


def test_the_gradients_of_all_layers_do_not_overlap_and_begin_where_a_vector_may(device):
    layers, task = layers_of_ranks([3, 1, 2], tokens=7)
    layers, task = [layer.to(device) for layer in layers], task.to(device)
    tables = ops.gaussian_kl_tables(ops.task_moments(layers, task, 4))[1]
    dz = gaussian_kl_backward(torch.ones((), device=device), layers, task, tables)
    before = [part.clone() for part in dz]
    dz[1].fill_(7)
    assert torch.equal(dz[0], before[0])
    assert torch.equal(dz[2], before[2])
    assert all(part.storage_offset() % 16 == 0 for part in dz)


def test_tables_of_all_layers_match_autograd_of_the_pairs(device):
    layers = [[t.to(device) for t in make(200, 6, 4, seed=seed)] for seed in range(3)]
    moments = torch.stack([ops.task_moments(*layer, 4) for layer in layers])
    loss, tables = (t.cpu() for t in ops.gaussian_kl_tables(moments))
    moments = moments.cpu()
    exact_loss, exact_tables = reference.gaussian_kl_tables(moments.double())
    torch.testing.assert_close(loss.double(), exact_loss, rtol=1e-5, atol=0)
    scale = exact_tables.abs().max()
    assert (tables.double() - exact_tables).abs().max() < 1e-5 * scale
