"""Measures the alignment losses, value and gradient, against plain PyTorch, and dropout against nn.Dropout."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align_ext import ops, reference
from align_ext.bench.setting import TASKS, Case, Setting, name_of
from align_ext.bench.timing import ROW_MS, Call, Comparison, Goal, training_step, visits
from align_ext.system.terminal import PrintLine

PAIRS = "pairs in plain PyTorch"
KL_CASES = ((5, 8), (25, 8), (5, 64))  # tasks, rank
KL_GOALS = {5: 50, 25: 300}
MMD_TOKENS, MMD_RANKS = 400, (8, 16, 64)  # tokens of each task
Kernels = Callable[[Tensor, Tensor, Tensor], Tensor]  # (tokens a, tokens b, bandwidth) -> kernels
DROPOUT_GOALS = {torch.float32: 15, torch.bfloat16: 10}


def gaussian_kl(tokens: int, tasks: int, rank: int, device: str, *, compiled: bool = False) -> dict[str, Call]:
    """Returns calls of gaussian_kl, the sum over pairs, and the closed form in plain PyTorch, also compiled."""
    torch.manual_seed(0)
    z, task = torch.randn(tokens, rank).to(device), (torch.arange(tokens) % tasks).to(device)
    closed = partial(kl_in_closed_form, task=task, tasks=tasks)
    result: dict[str, Call] = {
        "gaussian_kl": training_step(lambda z: ops.gaussian_kl(z, task, tasks), [z]),
        PAIRS: training_step(lambda z: reference.gaussian_kl(z, task, tasks), [z]),
        "closed form in plain PyTorch": training_step(closed, [z]),
    }
    if compiled:
        result["closed form, compiled"] = training_step(torch.compile(closed, dynamic=False), [z])
    return result


def kl_in_closed_form(z: Tensor, task: Tensor, tasks: int, eps: float = 1e-6) -> Tensor:
    """Computes gaussian_kl in O(tasks * rank) (docs/numerics.md); every task must have at least two tokens."""
    member = nn.functional.one_hot(task, tasks).to(z.dtype).T
    n = member.sum(1, keepdim=True)
    mu = member @ z / n
    v = member @ (z - mu[task]) ** 2 / n + eps
    c, p, vb = mu - mu.mean(0), 1 / v, v.mean(0)
    terms = tasks / vb * ((v - vb) ** 2 * p).sum(0) + tasks * (p * c**2).sum(0) + p.sum(0) * (c**2).sum(0)
    return terms.sum() / 4


def mk_mmd(tasks: int, tokens: int, rank: int, device: str, *, compiled: bool) -> dict[str, Call]:
    """Returns calls of mk_mmd for tasks with so many tokens each, and of the sum over pairs, also compiled.

    Compiled there are two forms: what mk_mmd computes, and its distances by products of matrices and its kernels by
    squaring, which is the fastest that torch.compile makes of it and loses the distances of near tokens.
    """
    torch.manual_seed(0)
    z, task = torch.randn(tasks * tokens, rank).to(device), torch.arange(tasks).repeat_interleave(tokens).to(device)
    options: Any = {"task": task, "num_tasks": tasks, "n_max": tokens}
    result: dict[str, Call] = {
        "mk_mmd": training_step(partial(ops.mk_mmd, **options), [z]),
        PAIRS: training_step(partial(reference.mk_mmd, **options), [z]),
    }
    if compiled:
        for name, kernels in (("pairs, compiled", by_differences), ("pairs by products, compiled", by_products)):
            pairs = torch.compile(partial(mmd_by_pairs, tasks=tasks, kernels=kernels), dynamic=False)
            result[name] = training_step(pairs, [z])
    return result


def by_differences(a: Tensor, b: Tensor, bw: Tensor) -> Tensor:
    """Computes the kernels of all pairs of tokens, summed over five bandwidths."""
    d2 = ((a[:, None] - b[None]) ** 2).sum(-1)
    total = torch.exp(-d2 / (bw / 4))
    for k in range(1, 5):
        total = total + torch.exp(-d2 / (bw * 2.0 ** (k - 2)))
    return total


def by_products(a: Tensor, b: Tensor, bw: Tensor) -> Tensor:
    """Computes the same from |a|² + |b|² - 2 a b, and each narrower kernel as the square of the next wider one."""
    d2 = ((a * a).sum(1)[:, None] + (b * b).sum(1)[None] - 2 * a @ b.T).clamp_min(0)
    total = kernel = torch.exp(-d2 / (bw * 4))
    for _ in range(4):
        kernel = kernel * kernel
        total = total + kernel
    return total


def mmd_by_pairs(z: Tensor, tasks: int, kernels: Kernels = by_differences) -> Tensor:
    """Computes the reference without its indexing: z holds one task after the other, and all tokens are used."""
    bw = 2 * z.detach().var(0, correction=1).sum()
    groups = z.chunk(tasks)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        return kernels(a, b, bw).mean()

    within = [mean(g, g) for g in groups]
    pairs = [(i, j) for i in range(tasks) for j in range(i)]
    return torch.stack([within[i] + within[j] - 2 * mean(groups[i], groups[j]) for i, j in pairs]).sum()


def dropout(tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """Returns calls of a layer with few outputs without and with dropout, and of nn.Dropout on x; both passes."""
    torch.manual_seed(0)
    sizes = ((tokens, width), (8, width), (8, 8), (tokens, 8))
    x, A, B, base = (torch.randn(size).to(device, dtype) for size in sizes)

    def layer(p: float) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.grouped_lora(x, A, B, base_out=base, dropout_p=p)[0]

    calls: dict[str, Call] = {f"layer, p={p:g}": training_step(layer(p), [x], base) for p in (0.0, 0.1)}
    return calls | {"nn.Dropout": training_step(nn.Dropout(0.1), [x], x)}


def _mask_alone(comparison: Comparison, dtype: torch.dtype) -> Comparison:
    """Returns the time that dropout adds to a layer in each round, and the time of nn.Dropout."""
    _, with_it, module = comparison.times_ms
    rounds = zip(comparison.baselines[with_it], comparison.times_ms[with_it], strict=True)
    added = [time - statistics.mean(without) for without, time in rounds]
    goal = Goal(DROPOUT_GOALS.get(dtype, 1), at_least=True)
    times = {"mask inside the op": added, module: comparison.times_ms[module]}
    return Comparison(times, baselines={module: [(ms, ms) for ms in added]}, goals={module: goal})


def losses(setting: Setting) -> Iterator[Case]:
    """Measures gaussian_kl, mk_mmd and dropout; the ratio says how much longer plain PyTorch takes."""
    device, tokens, seconds = setting.device, setting.sizes.tokens, setting.share
    per_task = min(MMD_TOKENS, tokens)
    compiled = setting.compiled > 0

    def kl(tasks: int, rank: int, _: PrintLine) -> Iterator[Comparison]:
        calls = gaussian_kl(tokens, tasks, rank, device, compiled=compiled)
        for result in visits(calls, setting.rounds, device, seconds=seconds, row_ms=ROW_MS):
            result.goals = {PAIRS: Goal(KL_GOALS[tasks], at_least=True)}
            yield result

    def mmd(rank: int, _: PrintLine) -> Iterator[Comparison]:
        calls = mk_mmd(TASKS, per_task, rank, device, compiled=compiled)
        known = {PAIRS: Goal(50, at_least=True), "pairs, compiled": Goal(5, at_least=True)}
        for result in visits(calls, setting.rounds, device, seconds=seconds, row_ms=ROW_MS):
            result.goals = {name: known[name] for name in calls if name in known}
            yield result

    def mask(dtype: torch.dtype, _: PrintLine) -> Iterator[Comparison]:
        calls = dropout(tokens, setting.shapes[0][0], dtype, device)
        for result in visits(calls, 2 * setting.rounds, device, seconds=seconds):
            yield _mask_alone(result, dtype)

    for tasks, rank in KL_CASES:
        yield Case(f"gaussian_kl, T={tokens}", f"M={tasks}, r={rank}", partial(kl, tasks, rank))
    for rank in MMD_RANKS:
        yield Case(f"mk_mmd, M={TASKS}, {per_task} tokens each", f"r={rank}", partial(mmd, rank))
    for dtype in setting.dtypes:
        yield Case(f"dropout of x, {tokens} x {setting.shapes[0][0]}, p=0.1", name_of(dtype), partial(mask, dtype))


def sweep(setting: Setting) -> Iterator[Case]:
    """Measures gaussian_kl for several numbers of tasks: points of the plots."""
    for tasks in (2, 5, 10, 25):
        table = f"sweep over tasks, gaussian_kl, T={setting.sizes.tokens}, r={setting.sizes.rank}"
        yield Case(table, f"M={tasks}", partial(_point, setting, tasks))


def _point(setting: Setting, tasks: int, _: PrintLine) -> Iterator[Comparison]:
    calls = gaussian_kl(setting.sizes.tokens, tasks, setting.sizes.rank, setting.device)
    for result in visits(calls, setting.rounds, setting.device, seconds=lambda: setting.share() / 4, row_ms=ROW_MS):
        result.point = ("tasks", tasks)
        yield result
