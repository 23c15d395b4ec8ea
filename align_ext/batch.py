"""One training step's alignment: task ids in, recorded moments, one loss node, gradient tables out.

    with align_step(model, task_ids, attention_mask) as step:      # forward: layers record the moments of z
        lm = model(**batch).loss
    step.total(lm).backward()                                      # lm + weight * align, one autograd node

or, the same behind forward hooks (align_ext/hooks.py):  model(**batch, task_ids=task_ids).loss.backward().

In backward the loss node runs first, since the model's own loss hangs below it, and arms the step's tables (the
gradient in z, affine per task and layer) with what came in. Each layer's backward finds the step by its key and adds
a[task] + b[task] * (z - mu[task]) to dz (align_ext/ops/_keyed.py). So the gradient is exact whatever the training
loop does: activation checkpointing of either kind, accumulation, loss scaling, pending forwards, compilation, data
parallelism.
docs/numerics.md derives the tables; docs/architecture.md follows one batch through these files.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from align_ext.config import AlignLoraConfig
from align_ext.losses.align import Alignment, align_kl, merge_moments, task_divergences
from align_ext.ops._keyed import register_step

NO_TASK = -1
_NO_IDS = (
    "alignment is on, but this training step has no task ids: call model(**batch, task_ids=ids), or run the forward "
    "inside `with align_step(model, ids)`; without tasks, use align=None or model.eval()"
)
_NOT_DIFFERENTIATED = (
    "backward reached an aligned layer, but not the alignment loss: differentiate step.total(loss), or the loss of "
    "model(..., task_ids=ids); align_step(..., strict=False) allows it, and the layer then gets no alignment gradient"
)


@dataclass(frozen=True)
class AlignParts:
    """The last step's losses, for logging. Reading them waits for the device.

    Attributes:
        lm: the model's own loss.
        align: the alignment value, before the weight.
        weight: lambda.
        per_layer: alignment of each adapted layer, by module name.
        per_task: alignment of each task with all others.
    """

    lm: float
    align: float
    weight: float
    per_layer: dict[str, float]
    per_task: list[float]


class AlignState:
    """What the aligned layers of one model share: options, slots, and the step under way.

    Copies and pickles carry the options and slots, never a step.
    """

    def __init__(self, config: AlignLoraConfig) -> None:
        self.config = config
        self.names: list[str] = []
        self.rank = 0  # the widest layer's
        self.tasks = config.num_tasks or 0
        self.current: Step | None = None  # between a step's opening and closing
        self.armed: list[Step] = []  # whose tables are set: inside a backward
        self.last: Step | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "current": None, "armed": [], "last": None}

    def add_layer(self, name: str, rank: int) -> Tensor:
        """Registers a layer and returns its slot, an int64 scalar on the CPU."""
        self.names.append(name)
        self.rank = max(self.rank, rank)
        # A tensor, not an int: the compiler would guard on the int and compile every layer anew.
        return torch.tensor(len(self.names) - 1, dtype=torch.int64, device="cpu")

    def find(self) -> Step | None:
        """The step that a layer's forward belongs to."""
        if self.current is not None:
            return self.current
        if self.armed and torch._C._current_graph_task_id() != -1:
            if len(self.armed) == 1:  # recomputation by a checkpoint that BoundCheckpoint does not wrap
                return self.armed[0]
            raise RuntimeError(
                "activation checkpointing recomputes below two summed losses and cannot tell their steps apart: use "
                "the model's own gradient_checkpointing_enable(), or differentiate the losses one by one"
            )
        if torch.is_grad_enabled():
            raise RuntimeError(_NO_IDS)
        return None


class Step:
    """One forward's task ids, recorded moments and, inside backward, gradient tables."""

    def __init__(
        self, state: AlignState, ids: Tensor, like: Tensor, *, strict: bool = True, by_keyword: bool = False
    ) -> None:
        self.state, self.strict, self.by_keyword = state, strict, by_keyword
        self.masked = False
        self.ids = self._check(ids.to(like.device))
        shape = (len(state.names), state.tasks, 2 * state.rank + 1)
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.stats = torch.zeros(shape, dtype=dtype, device=like.device)
        self.key = register_step(self)
        self.seen: set[int] = set()
        self.alignment: Alignment | None = None
        self._reached: set[int] = set()  # slots whose backward ran since the tables were armed
        self._d_align: Tensor | None = None  # what the tables are multiplied by, inside backward
        self._differentiated = False
        self._lm: Tensor | None = None
        self._weight = 0.0

    def _check(self, ids: Tensor) -> Tensor:
        if ids.dim() not in (1, 2) or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"task_ids must be integers, [B] or [B, S], got {ids.dtype} {list(ids.shape)}")
        config, state, ids = self.state.config, self.state, ids.long()
        if config.num_tasks is None:
            if _world_size() > 1:
                raise ValueError("num_tasks must be given when several processes train: every process needs the same")
            state.tasks = max(state.tasks, int(ids.max()) + 1 if ids.numel() else 0, 1)
        allowed = f"task_ids must be in 0 .. num_tasks-1 = {state.tasks - 1}, or {NO_TASK} for none"
        valid = ((ids >= NO_TASK) & (ids < state.tasks)).all()
        if ids.is_cuda:
            torch._assert_async(valid, allowed)  # does not wait for the device
        elif not valid:
            raise ValueError(f"{allowed}; got {int(ids.min())} .. {int(ids.max())}")
        return ids

    def mask(self, attention_mask: Tensor | None, labels: Tensor | None) -> None:
        """Takes padding, and with response_only tokens without a label, out of the statistics."""
        keep = None
        if attention_mask is not None:
            shape = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
            if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
                raise ValueError(
                    f"attention_mask must be [B, S] to tell padding, got {shape}: for other masks give ids per token, "
                    "-1 where a token does not count, and align_step(model, ids, attention_mask=ones)"
                )
            keep = attention_mask != 0
        if self.state.config.response_only:
            if labels is None:
                raise ValueError("response_only=True needs labels in the batch (or align_step(..., labels=labels))")
            keep = labels != -100 if keep is None else keep & (labels != -100)
        self.masked = True
        if keep is None:
            return
        ids = self.ids[:, None] if self.ids.dim() == 1 else self.ids
        if ids.shape[0] != keep.shape[0] or ids.shape[1] not in (1, keep.shape[1]):
            raise ValueError(f"task_ids {list(self.ids.shape)} do not fit a batch of {list(keep.shape)} tokens")
        self.ids = torch.where(keep.to(ids.device), ids, NO_TASK)

    @property
    def token_ids(self) -> Tensor:
        """int64, flat: one id per token, or one per sample that every token of it takes."""
        return self.ids.reshape(-1)

    def see(self, slot: int) -> None:
        """Notes that a layer ran."""
        if slot in self.seen:
            raise RuntimeError(
                f"the aligned layer {self.state.names[slot]!r} ran twice in one step: use one align_step (or one "
                "task_ids= call) per forward"
            )
        self.seen.add(slot)

    def tables_of(self, slot: int, rank: int) -> tuple[Tensor, Tensor] | None:
        """The incoming gradient and a | b | mu of one layer, [tasks, 3 rank]; None outside the loss's backward."""
        if self._d_align is None or self.alignment is None:
            if self.strict and not self._differentiated:
                raise RuntimeError(_NOT_DIFFERENTIATED)
            return None
        self._reached.add(slot)
        table = self.alignment.tables[slot]
        if rank < self.state.rank:
            table = table.unflatten(1, (3, -1))[..., :rank].flatten(1)
        return self._d_align, table

    def arm(self, d_align: Tensor) -> None:
        """Lets the tables act, times d_align, until the running backward ends."""
        self._d_align, self._differentiated = d_align, True
        self._reached.clear()
        self.state.armed.append(self)
        torch.autograd.Variable._execution_engine.queue_callback(self._disarm)

    def _disarm(self) -> None:
        unreached = [self.state.names[slot] for slot in sorted(self.seen - self._reached)]
        if unreached and self.strict:
            warnings.warn(
                f"the alignment did not reach {len(unreached)} layers, the first is {unreached[0]!r}: the loss does "
                "not depend on them, or their adapters are frozen; leave them out by exclude_modules",
                stacklevel=1,
            )
        self._d_align = None
        self.state.armed[:] = [step for step in self.state.armed if step is not self]

    @torch.compiler.disable
    def total(self, loss: Tensor, weight: float | None = None, scale: float = 1.0) -> Tensor:
        """Computes loss + weight * scale * align as one autograd node.

        Args:
            loss: scalar, the model's loss of this step's forward.
            weight: lambda; None takes config.align_weight.
            scale: a further factor on the alignment (1 / accumulation steps where the loss is divided already).

        Raises:
            RuntimeError: the loss has no graph, an aligned layer did not run, or the step has its total already.
        """
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss has no graph to reach the adapters: is the model under no_grad? Reentrant activation "
                "checkpointing needs model.enable_input_require_grads()"
            )
        missing = [name for slot, name in enumerate(self.state.names) if slot not in self.seen]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self.state.names)} aligned layers did not run in this step, the first "
                f"is {missing[0]!r}: leave layers that the model skips out by exclude_modules"
            )
        if self.alignment is not None:
            raise RuntimeError("this step has its total already: add the losses first, then step.total(sum) once")
        weight = self.state.config.align_weight if weight is None else weight
        with torch.no_grad():
            world = _world_size()
            self.stats = _all_moments(self.stats, world)
            self.alignment = align_kl(self.stats, self.state.config)
        self._lm, self._weight = loss.detach(), float(weight or 0.0)
        factor = self._weight * scale
        # Data parallelism averages gradients over the processes; the tables are of the whole batch already.
        return _Total.apply(loss, factor * self.alignment.value, self, factor * world * self.alignment.share)

    def parts(self) -> AlignParts:
        """The losses of this step, as numbers; after total(loss)."""
        if self.alignment is None or self._lm is None:
            raise RuntimeError("this step has no losses yet: call step.total(loss) first")
        pairs = task_divergences(self.stats, self.state.config)
        return AlignParts(
            lm=float(self._lm),
            align=float(self.alignment.value),
            weight=self._weight,
            per_layer=dict(zip(self.state.names, self.alignment.per_layer.tolist(), strict=True)),
            per_task=pairs.sum(1).tolist(),
        )


class _Total(torch.autograd.Function):
    """loss + align, whose backward arms the step's tables before the loss's own backward runs."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, align: Tensor, step: Step, factor: float) -> Tensor:
        ctx.step, ctx.factor = step, factor
        return loss + align.to(loss.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor, None, None, None]:
        ctx.step.arm(ctx.factor * d_total.double())
        return d_total, None, None, None


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_moments(stats: Tensor, world: int) -> Tensor:
    """The moments over all processes: one collective for all layers, merged in rank order: the same bits everywhere."""
    if world == 1:
        return stats
    parts = [torch.empty_like(stats) for _ in range(world)]
    dist.all_gather(parts, stats)
    merged = parts[0]
    for part in parts[1:]:
        merged = merge_moments(merged, part)
    return merged


class BoundCheckpoint:
    """A model's checkpoint function whose recomputation re-enters the step of its own forward."""

    def __init__(self, state: AlignState, checkpoint: Callable[..., Any]) -> None:
        self.state, self.checkpoint = state, checkpoint

    def __call__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checkpoints function(*args, **kwargs)."""
        if torch.compiler.is_compiling():  # the compiled backward recomputes without running Python
            return self.checkpoint(function, *args, **kwargs)
        state, step = self.state, self.state.current

        def run(*a: Any, **k: Any) -> Any:
            outer, state.current = state.current, step
            try:
                return function(*a, **k)
            finally:
                state.current = outer

        return self.checkpoint(run, *args, **kwargs)


def find_state(model: nn.Module) -> AlignState | None:
    """The alignment of a model, also through DDP, FSDP2 and torch.compile; None if it has no adapters."""
    for module in model.modules():
        state = module.__dict__.get("align_state")
        if isinstance(state, AlignState):
            return state
    return None


def _state_of(model: nn.Module) -> AlignState:
    state = find_state(model)
    if state is None:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    if state.config.align is None:
        raise ValueError('alignment is off for this model (align=None): choose align="kl" to use task ids')
    return state


def open_step(model: nn.Module, state: AlignState, ids: Tensor, **options: bool) -> Step:
    """A new step for a model's next forward; the model's checkpoint functions will find it again."""
    adapter = next(p for name, p in model.named_parameters() if "lora_A" in name)
    for module in model.modules():
        checkpoint = module.__dict__.get("_gradient_checkpointing_func")
        if isinstance(checkpoint, BoundCheckpoint):
            checkpoint.state = state
        elif checkpoint is not None:
            module._gradient_checkpointing_func = BoundCheckpoint(state, checkpoint)  # type: ignore[assignment]
    state.armed.clear()
    state.last = Step(state, torch.as_tensor(ids), adapter, **options)
    return state.last


@contextlib.contextmanager
def align_step(
    model: nn.Module,
    task_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    strict: bool = True,
) -> Iterator[Step]:
    """Opens an alignment step for one forward of the model; then differentiate step.total(loss).

    Args:
        model: adapted by replace_linear_with_align_lora; may be wrapped by DDP, FSDP2 or torch.compile. Batch first,
            and all adapted layers see the same tokens.
        task_ids: int64 [B] (one task a sample) or [B, S] (one a token); -1: belongs to no task.
        attention_mask: [B, S], 0 = padding, which does not count. Taken from the model's own arguments if not given
            (torch.compile: give it here).
        labels: [B, S], needed with response_only, likewise.
        strict: a backward that meets the layers without the alignment loss is an error.

    Yields:
        The step.

    Raises:
        ValueError: no adapters, alignment off, or ids of a wrong shape, dtype or range.
    """
    state = _state_of(model)
    if not model.training:
        raise ValueError("align_step is for training, but the model is in eval mode: call model.train() first")
    step = open_step(model, state, task_ids, strict=strict)
    if attention_mask is not None or labels is not None:
        step.mask(attention_mask, labels)
    outer, state.current = state.current, step
    try:
        yield step
    finally:
        state.current = outer


def align_parts(model: nn.Module) -> AlignParts | None:
    """The losses of the model's last alignment step; None without one, or before its step.total(loss)."""
    state = find_state(model)
    if state is None or state.last is None or state.last.alignment is None:
        return None
    return state.last.parts()
