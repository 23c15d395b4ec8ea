"""The alignment losses against the literal sums over pairs of tasks, value and gradient; dropout against nn.Dropout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align_ext import ops, reference
from align_ext.bench.setting import TASKS, Case, Say, Setting, name_of
from align_ext.bench.timing import Call, Comparison, Goal, measure, training_step

PAIRS = "pairs in plain PyTorch"
KL_CASES = ((5, 8), (25, 8), (5, 64))  # tasks, rank
KL_GOALS = {5: 50, 25: 300}
MMD_TOKENS, MMD_RANKS = 400, (8, 16, 64)  # tokens of each task
DROPOUT_GOALS = {torch.float32: 15, torch.bfloat16: 10}


def gaussian_kl(tokens: int, tasks: int, rank: int, device: str) -> dict[str, Call]:
    """gaussian_kl, and the same pair by pair."""
    torch.manual_seed(0)
    z, task = torch.randn(tokens, rank).to(device), (torch.arange(tokens) % tasks).to(device)
    return {
        "gaussian_kl": training_step(lambda z: ops.gaussian_kl(z, task, tasks), [z]),
        PAIRS: training_step(lambda z: reference.gaussian_kl(z, task, tasks), [z]),
    }


def mk_mmd(tasks: int, tokens: int, rank: int, device: str, *, compiled: bool) -> dict[str, Call]:
    """mk_mmd over tasks of so many tokens each, and the same pair by pair, as it is and compiled."""
    torch.manual_seed(0)
    z, task = torch.randn(tasks * tokens, rank).to(device), torch.arange(tasks).repeat_interleave(tokens).to(device)
    options: Any = {"task": task, "num_tasks": tasks, "n_max": tokens}
    result: dict[str, Call] = {
        "mk_mmd": training_step(partial(ops.mk_mmd, **options), [z]),
        PAIRS: training_step(partial(reference.mk_mmd, **options), [z]),
    }
    if compiled:
        result["pairs, compiled"] = training_step(torch.compile(partial(mmd_by_pairs, tasks=tasks), dynamic=False), [z])
    return result


def mmd_by_pairs(z: Tensor, tasks: int) -> Tensor:
    """The reference without its indexing: z holds one task after the other, and all tokens take part."""
    bw = 2 * z.detach().var(0, correction=1).sum()
    groups = z.chunk(tasks)

    def mean(a: Tensor, b: Tensor) -> Tensor:
        d2 = ((a[:, None] - b[None]) ** 2).sum(-1)
        return torch.stack([torch.exp(-d2 / (bw * 2.0 ** (k - 2))).mean() for k in range(5)]).sum()

    within = [mean(g, g) for g in groups]
    pairs = [(i, j) for i in range(tasks) for j in range(i)]
    return torch.stack([within[i] + within[j] - 2 * mean(groups[i], groups[j]) for i, j in pairs]).sum()


def dropout(tokens: int, width: int, dtype: torch.dtype, device: str) -> dict[str, Call]:
    """A layer with next to no outputs without dropout and with it, and nn.Dropout on the same x; both passes."""
    torch.manual_seed(0)
    sizes = ((tokens, width), (8, width), (8, 8), (tokens, 8))
    x, A, B, base = (torch.randn(size).to(device, dtype) for size in sizes)

    def layer(p: float) -> Callable[[Tensor], Tensor]:
        return lambda x: ops.grouped_lora(x, A, B, base_out=base, dropout_p=p)[0]

    calls: dict[str, Call] = {f"layer, p={p:g}": training_step(layer(p), [x], base) for p in (0.0, 0.1)}
    return calls | {"nn.Dropout": training_step(nn.Dropout(0.1), [x], x)}


def _mask_alone(comparison: Comparison, dtype: torch.dtype) -> Comparison:
    """What dropout adds to a layer, round by round, and nn.Dropout beside it."""
    without, with_it, module = comparison.times_ms.values()
    added = [b - a for a, b in zip(without, with_it, strict=True)]
    goal = Goal(DROPOUT_GOALS.get(dtype, 1), at_least=True)
    return Comparison({"mask inside the op": added, "nn.Dropout": module}, goals={"nn.Dropout": goal})


def losses(setting: Setting) -> Iterator[Case]:
    """gaussian_kl, mk_mmd and dropout, each against plain PyTorch; the ratio says how much longer that takes."""
    device, tokens, seconds = setting.device, setting.sizes.tokens, setting.seconds
    per_task = min(MMD_TOKENS, tokens)

    def kl(tasks: int, rank: int, _: Say) -> Comparison:
        calls = gaussian_kl(tokens, tasks, rank, device)
        result = measure(calls, 2 * setting.rounds, device, seconds=seconds)
        result.goals = {PAIRS: Goal(KL_GOALS[tasks], at_least=True)}
        return result

    def mmd(rank: int, _: Say) -> Comparison:
        calls = mk_mmd(TASKS, per_task, rank, device, compiled=setting.compiled > 0)
        result = measure(calls, setting.rounds, device, seconds=seconds)
        known = {PAIRS: Goal(50, at_least=True), "pairs, compiled": Goal(5, at_least=True)}
        result.goals = {name: known[name] for name in calls if name in known}
        return result

    def mask(dtype: torch.dtype, _: Say) -> Comparison:
        calls = dropout(tokens, setting.shapes[0][0], dtype, device)
        return _mask_alone(measure(calls, 2 * setting.rounds, device, seconds=seconds), dtype)

    for tasks, rank in KL_CASES:
        yield Case(f"gaussian_kl, M={tasks}, T={tokens}, r={rank}", partial(kl, tasks, rank))
    for rank in MMD_RANKS:
        yield Case(f"mk_mmd, M={TASKS}, {per_task} tokens each, r={rank}", partial(mmd, rank))
    for dtype in setting.dtypes:
        shape = f"{tokens} x {setting.shapes[0][0]}"
        yield Case(f"dropout of x, {shape}, {name_of(dtype)}, p=0.1", partial(mask, dtype))


def sweep(setting: Setting) -> Iterator[Case]:
    """gaussian_kl against the number of tasks: points of the plots."""
    for tasks in (2, 5, 10, 25):
        yield Case(
            f"sweep over tasks, gaussian_kl, M={tasks}, T={setting.sizes.tokens}, r={setting.sizes.rank}",
            partial(_point, setting, tasks),
        )


def _point(setting: Setting, tasks: int, _: Say) -> Comparison:
    calls = gaussian_kl(setting.sizes.tokens, tasks, setting.sizes.rank, setting.device)
    result = measure(calls, setting.rounds, setting.device, seconds=setting.seconds / 4)
    result.point = ("tasks", tasks)
    return result
