"""Adapters that depend on the task of a token, and the one of each task (Multi-Adapter)."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.base import Adapter, Factors, LowRankOutput
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.ops import grouped_lora


class TaskAdapter(Adapter):
    """One low-rank path for each of M tasks, s B_k A_k x for a token of task k, and a group of grouped_lora each.

    A subclass has `factors_of_tasks`: A_k and B_k of all tasks, made of its parameters. In evaluation a task has to be
    named: model(..., task_ids=ids) or set_task(model, k).
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        assert config.num_tasks is not None
        self.init, self.tasks, self.architecture = config.init_lora_weights, config.num_tasks, config.architecture

    def factors_of_tasks(self) -> Factors:
        """Returns A [M, R, n] and B [M, m, R] of the tasks."""
        raise NotImplementedError

    def latents(self, z: Tensor) -> Tensor:
        """Returns what is aligned of A_k x [T, R]."""
        return z

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        A, B = self.factors_of_tasks()
        if current is not None:
            op["order"] = current.order(x)
        elif isinstance(k := self._named_task(), Tensor):
            op["group"] = _of_samples(k, x)
        else:
            A, B = A[k], B[k]
        y, z = grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **op)
        return y, self.latents(z), None

    def _named_task(self) -> int | Tensor:
        task = None if self.state is None else self.state.task
        if task is None:
            raise RuntimeError(
                f"a {self.architecture} model needs to know the task: call model(..., task_ids=ids), or "
                "set_task(model, k) for generation"
            )
        return task

    def unmergeable_reason(self) -> str | None:
        """Why not: no task is named."""
        if self.state is None or self.state.task is None:
            return "it has an adapter for each task: name one with set_task(model, k)"
        return None

    @override
    def delta_factors(self) -> list[Factors]:
        """(A_k, B_k) of the named task k, in terms of rank r."""
        task = self._named_task()
        A, B = (factor[task] for factor in self.factors_of_tasks())
        return list(zip(A.split(self.r), B.split(self.r, 1), strict=True))


class MultiAdapter(TaskAdapter):
    """An adapter of its own for each of M tasks; k is the task of the token (Multi-Adapter of 2508.05078).

    z = A_k dropout(x),   y = base(x) + s B_k z
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_A = nn.Parameter(torch.empty(self.tasks, self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(self.tasks, out_features, self.r))

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        init.each(self.init, self.lora_A.data, self.lora_B.data)

    @override
    def factors_of_tasks(self) -> Factors:
        return self.lora_A, self.lora_B


def _of_samples(tasks: Tensor, x: Tensor) -> Tensor:
    """int64 [T], the task of every token of x [rows, ..., n]: each sample has as many rows as the next (beams)."""
    rows, tokens = len(x), x.shape[:-1].numel()
    if rows % len(tasks):
        raise RuntimeError(f"a layer saw {rows} rows of tokens, but {len(tasks)} samples have a task")
    return tasks.to(x.device).repeat_interleave(tokens // len(tasks))
