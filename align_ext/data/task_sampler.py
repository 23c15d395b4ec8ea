"""Mixes tasks into batches by given shares, with enough examples of each task in a batch, reproducibly."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import get_args

from torch.utils.data import Sampler

from align_ext.config import Mixing
from align_ext.data.join_tasks import task_number
from align_ext.system.bounds import is_positive, unknown_name
from align_ext.system.messages import shown


class TaskSampler(Sampler[int]):
    """Orders examples so that each batch holds few tasks, and enough examples of each to compare them.

    A batch of b examples has up to b // per_task tasks with at least per_task examples each (the statistics of one
    example's tokens are poor; alignment needs two tasks; per_task=1 allows any batch size). The tasks and the numbers
    of their examples follow the shares

        proportional  n_i / Σ n       temperature  n_i^(1/T) / Σ n^(1/T)       equal  1 / M

    times the task's weight, if there are weights, over time: each batch adds every task's share to its balance, and
    goes to the tasks with the largest balances. Since a batch has at least two tasks (if there are two), very small
    tasks occur more often than their shares. round_robin takes the tasks in turn instead. The examples of a task come
    in random order, each once before any is repeated; every epoch has its own order, determined by (seed, epoch), so
    that a resumed run that skips the earlier examples continues exactly.

    Args:
        tasks: the task of each example, as in a dataset's column task_ids; examples of task -1 are left out.
        batch_size: the number of examples in a batch of one process.
        mixing: how the shares are computed.
        temperature: T, 1 or more: from proportional (1) towards equal.
        per_task: the least number of examples of a task in a batch.
        batches: the number of batches in an epoch; None: enough for all examples.
        seed: the seed of the order.
        weights: task -> by what its share is multiplied before all shares are divided by their sum; 1 for others.

    Raises:
        ValueError: an option is out of range, weights are given with round_robin, no example has a task, or a batch is
            too small for two tasks.
    """

    def __init__(
        self, tasks: Sequence[int], batch_size: int, mixing: Mixing = "proportional", *, temperature: float = 2.0,
        per_task: int = 2, batches: int | None = None, seed: int = 0, weights: Mapping[int, float] | None = None,
    ) -> None:  # fmt: skip
        if mixing not in get_args(Mixing):
            raise ValueError(unknown_name("mixing", str(mixing), get_args(Mixing)))
        if not temperature >= 1:
            raise ValueError(f"temperature must be at least 1, got {temperature}")
        self.pools: dict[int, list[int]] = {}
        for index, task in enumerate(map(task_number, tasks)):
            if task >= 0:
                self.pools.setdefault(task, []).append(index)
        if not self.pools:
            raise ValueError("no example belongs to a task: task_ids are empty or all -1")
        minimum = per_task * min(2, len(self.pools)) if per_task > 1 else 1
        if per_task < 1 or batch_size < minimum:
            raise ValueError(
                f"batch_size={batch_size} must hold two tasks with per_task={per_task} examples of each, and per_task "
                "must be at least 1: take a larger batch, or per_task=1"
            )
        self.batch_size, self.mixing, self.per_task, self.seed, self.epoch = batch_size, mixing, per_task, seed, 0
        sizes = {task: len(pool) for task, pool in sorted(self.pools.items())}
        power = {"proportional": 1.0, "temperature": 1 / temperature}.get(mixing, 0.0)
        shares = {task: size**power for task, size in sizes.items()}
        if weights:
            if mixing == "round_robin" or not all(is_positive(weight) for weight in weights.values()):
                raise ValueError(f"weights={shown(dict(weights))} must be positive numbers, and round_robin has none")
            shares = {task: share * weights.get(task, 1.0) for task, share in shares.items()}
        total = sum(shares.values())
        self.shares = {task: share / total for task, share in shares.items()}
        self.batches = batches if batches is not None else -(-sum(sizes.values()) // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Selects the order of an epoch; AlignMixin and accelerate call it."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def drawn(self) -> dict[int, float]:
        """Returns the share that each task has of an epoch's examples, where `shares` is what was asked for."""
        task_of = {index: task for task, pool in self.pools.items() for index in pool}
        counts = Counter(task_of[index] for index in self)
        return {task: counts[task] / len(self) for task in self.shares} if len(self) else dict(self.shares)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        streams = {task: _shuffled_forever(pool, rng) for task, pool in sorted(self.pools.items())}
        for counts in self._plan(rng):
            batch = [next(streams[task]) for task, count in counts.items() for _ in range(count)]
            yield from rng.sample(batch, len(batch))

    def _plan(self, rng: random.Random) -> Iterator[dict[int, int]]:
        """Yields the number of examples of each task in each batch."""
        names, max_tasks = list(self.shares), max(1, self.batch_size // self.per_task)
        balance = dict.fromkeys(names, 0.0)
        for number in range(self.batches):
            for task in names:
                balance[task] += self.shares[task] * self.batch_size
            if self.mixing == "round_robin":
                count = min(max_tasks, len(names))
                chosen = [names[(number * count + i) % len(names)] for i in range(count)]
            else:
                first = sorted(names, key=lambda task: (-balance[task], rng.random()))[:max_tasks]
                # Tasks with a balance below per_task wait, but a batch needs two tasks to compare.
                chosen = [task for i, task in enumerate(first) if i < 2 or balance[task] >= self.per_task]
            counts = dict.fromkeys(chosen, self.per_task)
            for _ in range(self.batch_size - self.per_task * len(chosen)):
                counts[max(chosen, key=lambda task: (balance[task] - counts[task], -names.index(task)))] += 1
            for task, count in counts.items():
                balance[task] -= count
            yield counts


def _shuffled_forever(pool: list[int], rng: random.Random) -> Iterator[int]:
    while True:
        yield from rng.sample(pool, len(pool))
