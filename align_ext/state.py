"""What the adapters of one model share: options, places in a step, the step under way, what earlier steps left."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from align_ext.config import AlignLoraConfig
from align_ext.losses.kl import KlStatistics
from align_ext.losses.mmd import MmdStatistics
from align_ext.reading import shown

if TYPE_CHECKING:
    from align_ext.batch import Step

Statistics = KlStatistics | MmdStatistics
STATISTICS: dict[str, type[Statistics]] = {"kl": KlStatistics, "mmd": MmdStatistics}
_NO_IDS = (
    "{what} needs task ids, but this training step has none: call model(**batch, task_ids=ids), or run the forward "
    "inside `with align_step(model, ids)`; without tasks, use align=None or model.eval()"
)
_NO_STEP = (
    "an adapted layer trains outside a step, which its losses need: call the whole model, or run this inside "
    "`with align_step(model, None)`"
)


@dataclass(frozen=True)
class AlignParts:
    """The last step's losses, for logging. Reading them waits for the device.

    Attributes:
        lm: the model's own loss.
        align: the alignment value, before the weight; 0 without alignment.
        weight: lambda.
        per_layer: alignment of each adapted layer, by module name.
        per_task: alignment of each task with all others.
        balance: the balance loss, before its weight; None without.
        spectral: the spectral loss, before its weight; None without.
    """

    lm: float
    align: float
    weight: float
    per_layer: dict[str, float]
    per_task: list[float]
    balance: float | None = None
    spectral: float | None = None


@dataclass(frozen=True)
class UnionPart:
    """One micro-batch's place among several that are aligned as one batch (align_ext/accumulation.py).

    Attributes:
        statistics: of all micro-batches (and processes), as this one needs them.
        parts: how many micro-batches there are.
        rng: the states of the generators before its forward.
    """

    statistics: Statistics
    parts: int
    rng: tuple[Tensor, ...]

    def restore_rng(self) -> None:
        """Sets torch's generators so that the forward draws the dropout masks of the first pass."""
        torch.set_rng_state(self.rng[0])
        if len(self.rng) > 1:
            torch.cuda.set_rng_state_all(list(self.rng[1:]))


class AlignState:
    """What the adapters of one model share: options, slots, and the step under way.

    Copies and pickles carry the options and slots, never a step.
    """

    def __init__(self, config: AlignLoraConfig) -> None:
        self.config = config
        self.names: list[str] = []
        self.rank = 0  # the widest layer's
        self.tasks = config.num_tasks or 0
        self.task: int | Tensor | None = None  # that evaluation is about (set_task), or of each sample, [B]
        self.spectral: list[Callable[[], Tensor]] = []  # each layer's spectral loss
        self.arguments: tuple[str, ...] = ()  # of the model's forward, by name
        self.handles: tuple[RemovableHandle, ...] = ()  # of the hooks on the model and its parts
        self.report: Any = None  # of the adaptation (hf/replace.py)
        self.current: Step | None = None  # between a step's opening and closing
        self.suspended: Step | None = None  # while the model runs once more for metrics
        self.armed: list[Step] = []  # inside a backward: those whose layers are owed gradients
        self.last: Step | None = None
        self.originals: dict[str, Tensor] = {}  # the base's values of what is trained beside the adapters, for unload
        self.buffers: dict[str, Tensor | None] = {}  # the base's, which training may change (hf/beside.py)
        self.samples: dict[str, Any] = {}  # of the base's weights, taken while they were whole (hf/base_model.py)
        self.queue: deque[Statistics] = deque(maxlen=config.align_queue)  # of the last micro-batches
        self.encoder_decoder = False  # the model has an encoder and a decoder, whose tokens differ
        self.batch_first = False  # a batch of more or fewer samples than tokens has shown it
        self.sources: dict[int, str] = {}  # by slot, where a layer's tokens come from (align_ext/tokens.py)

    def __getstate__(self) -> dict[str, Any]:
        queue: deque[Statistics] = deque(maxlen=self.queue.maxlen)
        return {**self.__dict__, "current": None, "suspended": None, "armed": [], "last": None, "queue": queue}

    def add_layer(self, name: str, rank: int) -> int:
        """Registers a layer whose outputs a step records; returns its number."""
        self.names.append(name)
        self.rank = max(self.rank, rank)
        return len(self.names) - 1

    def find(self, training: bool = True) -> Step | None:
        """The step that a layer's forward belongs to; None where it needs none."""
        if self.current is not None:
            return self.current
        if not training:
            return None
        if self.armed and torch._C._current_graph_task_id() != -1:
            if len(self.armed) == 1:  # recomputation by a checkpoint that BoundCheckpoint does not wrap
                return self.armed[0]
            raise RuntimeError(
                "activation checkpointing recomputes below two summed losses and cannot tell their steps apart: use "
                "the model's own gradient_checkpointing_enable(), or differentiate the losses one by one"
            )
        if torch.is_grad_enabled():
            config = self.config
            what = f"align={config.align!r}" if config.align else f"architecture={config.architecture!r}"
            raise RuntimeError(_NO_IDS.format(what=what) if config.needs_ids else _NO_STEP)
        return None


def find_state(model: nn.Module) -> AlignState | None:
    """The state of a model's adapters, also through DDP, FSDP2 and torch.compile; None if it has none."""
    check_model(model)
    for module in model.modules():
        state = module.__dict__.get("align_state")
        if isinstance(state, AlignState):
            return state
    return None


def refuse_compiled_autograd(*, ahead: bool = True) -> None:
    """Raises RuntimeError where the compiler traces backward, which hands out the step's gradients by Python.

    Args:
        ahead: or, if it does not yet, will in compiled models; to look that option up takes a microsecond.
    """
    dynamo = sys.modules.get("torch._dynamo")  # nothing is compiled where nobody imported it
    if dynamo is None:
        return
    autograd = dynamo.compiled_autograd
    on = autograd.compiled_autograd_enabled or autograd.in_compiled_autograd_region
    if on or (ahead and dynamo.config.compiled_autograd):
        raise RuntimeError(
            "compiled autograd cannot trace the backward of the adapters' losses: set "
            "torch._dynamo.config.compiled_autograd = False; torch.compile(model) compiles the layers' backward as well"
        )


def check_model(model: Any) -> None:
    """Raises ValueError for what is no model."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {shown(model)}: load it first (from_pretrained)")


def refuse_parts_of_a_model(model: nn.Module) -> None:
    """Raises ValueError for a model that other processes hold parts of; FSDP2's shards are whole in forward."""
    modules: list[Any] = list(model.modules()) if isinstance(model, nn.Module) else [model]
    kinds = {kind.__name__ for module in modules for kind in type(module).__mro__}
    if "_PipelineStageBase" in kinds or any("_pp_stage" in module.__dict__ for module in modules):
        raise ValueError(
            "the model is a pipeline stage, whose layers see no loss and no task ids: train the whole model with "
            "DistributedDataParallel or fully_shard after replace_linear_with_align_lora"
        )
    parallel = any((module.__dict__.get("_tp_size") or 1) > 1 for module in modules)
    # DTensor by its attribute: its module takes long to import.
    sharded = "FSDPModule" not in kinds and any(hasattr(p, "device_mesh") for p in model.parameters())
    if parallel or sharded:
        raise ValueError(
            "the model's weights are split over processes (tensor parallelism): load it without a tensor parallel "
            "plan, call replace_linear_with_align_lora, then use DistributedDataParallel or fully_shard"
        )


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def refuse_processes_apart(cure: str = 'call torch.distributed.init_process_group("gloo" or "nccl") first') -> None:
    """Raises RuntimeError if a launcher started several processes, which have not joined."""
    started = os.environ.get("WORLD_SIZE", "1")
    if "RANK" in os.environ and started.isdecimal() and int(started) > 1 and world_size() == 1:
        raise RuntimeError(f"{started} processes were started, but each would train by itself: {cure}")
