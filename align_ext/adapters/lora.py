"""LoRA (Hu et al. 2021, 2106.09685), Align-LoRA (2508.05078) and one LoRA for each task (Multi-Adapter)."""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from align_ext.adapters import init
from align_ext.adapters.base import Adapter, Factors, LowRankOutput, offset_factors
from align_ext.alignment.step import AlignStep
from align_ext.config import AlignLoraConfig
from align_ext.ops import dropout_sum, grouped_lora


class LoraAdapter(Adapter):
    """One adapter.

        z = A dropout(x)                [T, r]
        y = base(x) + s B z             [..., m]
        y = base(x) + s (B z + b)       with lora_bias

    With alignment (Align-LoRA, eq. 2), z is what is aligned. A PiSSA start keeps B0 A0 = B A of the start, frozen:
    y = base(x) + s (B z - B0 A0 dropout(x)), and the base weight is never touched.
    """

    lora_A0: Tensor | None
    lora_B0: Tensor | None

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.init = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, self.r))
        offset = self.init == "pissa"
        self.register_buffer("lora_A0", torch.empty(self.r, in_features) if offset else None)
        self.register_buffer("lora_B0", torch.empty(out_features, self.r) if offset else None)

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        A, B = self.lora_A, self.lora_B
        if self.init == "pissa":
            assert weight is not None
            assert self.lora_A0 is not None
            assert self.lora_B0 is not None
            init.pissa(A.data, B.data, weight, self.scaling)
            self.lora_A0.copy_(A.detach())
            self.lora_B0.copy_(B.detach())
        else:
            init.ZERO_PRODUCT[self.init](A.data, B.data)

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        A, B = self.lora_A, self.lora_B
        if self.init != "pissa":
            return *grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **op), None
        op |= {"A0": self.lora_A0, "B0": self.lora_B0, "site": "input"}
        return *dropout_sum(x, A, B[None], self.scaling, dropout_p=dropout_p, **op), None

    @override
    def sibling_arguments(self) -> tuple[Tensor, Tensor, float] | None:
        plain = type(self) is LoraAdapter and self.init != "pissa"  # a subclass may compute something else
        return (self.lora_A, self.lora_B, self.scaling) if plain else None

    @override
    def delta_factors(self) -> list[Factors]:
        """(A, B), and the offset (A0, -B0) of a PiSSA start."""
        return [(self.lora_A, self.lora_B), *offset_factors(self.lora_A0, self.lora_B0)]


class MultiAdapter(Adapter):
    """An adapter of its own for each of M tasks; k is the task of the token (Multi-Adapter of 2508.05078).

        z = A_k dropout(x),   y = base(x) + s B_k z

    In evaluation a task has to be named: model(..., task_ids=ids) or set_task(model, k).
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        assert config.num_tasks is not None
        self.init = config.init_lora_weights
        self.lora_A = nn.Parameter(torch.empty(config.num_tasks, self.r, in_features))
        self.lora_B = nn.Parameter(torch.empty(config.num_tasks, out_features, self.r))

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        A, B = self.lora_A.data, self.lora_B.data
        for of_task in zip(A, B, strict=True):
            init.ZERO_PRODUCT[self.init](*of_task)

    @override
    def low_rank_forward(self, x: Tensor, dropout_p: float, current: AlignStep | None, **op: Any) -> LowRankOutput:
        A, B = self.lora_A, self.lora_B
        if current is not None:
            op["order"] = current.order(x)
            return *grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **op), None
        k = self._named_task()
        if isinstance(k, Tensor):
            op["group"] = _of_samples(k, x)
            return *grouped_lora(x, A, B, self.scaling, dropout_p=dropout_p, **op), None
        return *grouped_lora(x, A[k], B[k], self.scaling, dropout_p=dropout_p, **op), None

    def _named_task(self) -> int | Tensor:
        task = None if self.state is None else self.state.task
        if task is None:
            raise RuntimeError(
                "a multi_adapter model needs to know the task: call model(..., task_ids=ids), or set_task(model, k) "
                "for generation"
            )
        return task

    def unmergeable_reason(self) -> str | None:
        """Why not: no task is named."""
        if self.state is None or self.state.task is None:
            return "it has an adapter for each task: name one with set_task(model, k)"
        return None

    @override
    def delta_factors(self) -> list[Factors]:
        """(A_k, B_k) of the named task k."""
        task = self._named_task()
        return [(self.lora_A[task], self.lora_B[task])]


def _of_samples(tasks: Tensor, x: Tensor) -> Tensor:
    """int64 [T], the task of every token of x [rows, ..., n]: each sample has as many rows as the next (beams)."""
    rows, tokens = len(x), x.shape[:-1].numel()
    if rows % len(tasks):
        raise RuntimeError(f"a layer saw {rows} rows of tokens, but {len(tasks)} samples have a task")
    return tasks.to(x.device).repeat_interleave(tokens // len(tasks))
