"""One training step's alignment: task ids in, the layers' latents, one loss node, their gradients out.

    with align_step(model, task_ids, attention_mask) as step:      # forward: layers hand over their latent z
        lm = model(**batch).loss
    step.total(lm).backward()                                      # lm + weight * align, one autograd node

or, the same behind forward hooks (align_ext/hooks.py):  model(**batch, task_ids=task_ids).loss.backward().

In backward the loss node runs first, since the model's own loss hangs below it, and arms the step: it computes the
gradient in every latent, times what came in. Each layer's backward finds the step by its key and adds its share to dz
(align_ext/ops/_keyed.py). So the gradient is exact whatever the training loop does: activation checkpointing of either
kind, accumulation, loss scaling, pending forwards, compilation, data parallelism.
The latents are the layers' own tensors, not copies (a compiled graph's are). The step holds them until total, then the
loss node does, as what it saved for backward: they go when autograd frees the loss's graph.
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
from align_ext.losses.align import Alignment, TokenTasks, align_kl, merge_moments, task_divergences
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
        self.armed: list[Step] = []  # inside a backward: those whose layers are owed gradients
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
    """One forward's task ids, the layers' latents and, inside backward, the gradients of these."""

    def __init__(
        self, state: AlignState, ids: Tensor, like: Tensor, *, strict: bool = True, by_keyword: bool = False
    ) -> None:
        self.state, self.strict, self.by_keyword = state, strict, by_keyword
        self.masked = False
        self.tokens = TokenTasks(self._check(ids.to(like.device)))
        self.key = register_step(self)
        self.door = torch.zeros((), dtype=torch.int64, device="cpu")  # of keep_ (align_ext/ops/_keyed.py)
        self.seen: set[int] = set()
        self.alignment: Alignment | None = None
        self._latents: dict[int, Tensor] = {}  # of the layers that ran, by slot, until total
        self._moments: Tensor | None = None
        self._dz: dict[int, Tensor] | None = None  # what no layer has taken yet, inside backward
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
        given = self.tokens.ids
        ids = given[:, None] if given.dim() == 1 else given
        if ids.shape[0] != keep.shape[0] or ids.shape[1] not in (1, keep.shape[1]):
            raise ValueError(f"task_ids {list(given.shape)} do not fit a batch of {list(keep.shape)} tokens")
        self.tokens = TokenTasks(torch.where(keep.to(ids.device), ids, NO_TASK))

    def keep(self, slot: Tensor, z: Tensor) -> None:
        """Takes the latent of a layer that ran, without a graph."""
        if torch.compiler.is_compiling():
            torch.ops.align_ext.keep_(self.door, z, self.key, slot)
        else:
            self.receive(int(slot), z)

    def receive(self, slot: int, z: Tensor) -> None:
        """Keeps the latent of a layer that ran; a second time is an error."""
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing recomputes the layer inside backward: its z is here already
        if slot in self.seen:
            raise RuntimeError(
                f"the aligned layer {self.state.names[slot]!r} ran twice in one step: use one align_step (or one "
                "task_ids= call) per forward"
            )
        self.tokens.check(len(z))
        self.seen.add(slot)
        self._latents[slot] = z

    def moments(self) -> Tensor:
        """Computes n | mean | M2 of this process's tokens, [layers, tasks, 2 rank + 1]; before total."""
        return self.tokens.moments(self._latents, len(self.state.names), self.state.tasks, self.state.rank)

    def take(self, slot: int) -> Tensor | None:
        """What a layer adds to dz, the caller's own from now on; None outside the loss's backward."""
        if self._dz is None:
            if self.strict and not self._differentiated:
                raise RuntimeError(_NOT_DIFFERENTIATED)
            return None
        if slot not in self._dz:
            raise RuntimeError(f"one backward reached the aligned layer {self.state.names[slot]!r} twice")
        return self._dz.pop(slot)

    def arm(self, d_total: Tensor, factor: float, latents: dict[int, Tensor]) -> None:
        """Computes the gradients in all latents, for the layers to take until the running backward ends."""
        assert self.alignment is not None
        self._dz = self.tokens.gradients(latents, self.alignment.tables, d_total, factor)
        self._differentiated = True
        self.state.armed.append(self)
        torch.autograd.Variable._execution_engine.queue_callback(self._disarm)

    def _disarm(self) -> None:
        unreached = [self.state.names[slot] for slot in sorted(self._dz or ())]
        if unreached and self.strict:
            warnings.warn(
                f"the alignment did not reach {len(unreached)} layers, the first is {unreached[0]!r}: the loss does "
                "not depend on them, or their adapters are frozen; leave them out by exclude_modules",
                stacklevel=1,
            )
        self._dz = None
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
        world = _world_size()
        with torch.no_grad():
            self._moments = _all_moments(self.moments(), world)
            self.alignment = align_kl(self._moments, self.state.config)
        latents, self._latents = self._latents, {}
        self._lm, self._weight = loss.detach(), float(weight or 0.0)
        factor = self._weight * scale
        # Data parallelism averages gradients over the processes; the tables are of the whole batch already.
        return _Total.apply(loss, self.alignment.value, factor, factor * world * self.alignment.share, self, latents)

    def parts(self) -> AlignParts:
        """The losses of this step, as numbers; after total(loss)."""
        if self.alignment is None or self._moments is None or self._lm is None:
            raise RuntimeError("this step has no losses yet: call step.total(loss) first")
        pairs = task_divergences(self._moments, self.state.config)
        return AlignParts(
            lm=float(self._lm),
            align=float(self.alignment.value),
            weight=self._weight,
            per_layer=dict(zip(self.state.names, self.alignment.per_layer.tolist(), strict=True)),
            per_task=pairs.sum(1).tolist(),
        )


class _Total(torch.autograd.Function):
    """loss + factor * align, whose backward arms the step before the loss's own backward runs."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, align: Tensor, factor: float, d_factor: float, step: Step, latents: dict[int, Tensor]
    ) -> Tensor:
        ctx.step, ctx.factor, ctx.slots = step, d_factor, tuple(latents)
        ctx.save_for_backward(*latents.values())  # freed when the graph of the loss is
        return torch.add(loss, align, alpha=factor).to(loss.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        ctx.step.arm(d_total, ctx.factor, dict(zip(ctx.slots, ctx.saved_tensors, strict=True)))
        return d_total, *[None] * 5


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _all_moments(moments: Tensor, world: int) -> Tensor:
    """The moments over all processes: one collective for all layers, merged in rank order: the same bits everywhere."""
    if world == 1:
        return moments
    parts = [torch.empty_like(moments) for _ in range(world)]
    dist.all_gather(parts, moments)
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
