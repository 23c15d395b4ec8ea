"""The state that the adapters of one model share, and how it is found."""

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from align_ext.alignment.guards import check_model
from align_ext.config import AlignLoraConfig
from align_ext.losses.statistics import Statistics

_NO_IDS = (
    "{what} needs task ids, but this training step has none: call model(**batch, task_ids=ids), or run the forward "
    "inside `with align_step(model, ids)`; without tasks, use align=None or model.eval()"
)
_NO_STEP = (
    "an adapted layer trains outside a step, which its losses need: call the whole model, or run this inside "
    "`with align_step(model, None)`"
)


class AlignState:
    """The state of the adapters of one model: options, layers, and the step under way.

    Copies and pickles carry the options and layers, never a step.
    """

    def __init__(self, config: AlignLoraConfig) -> None:
        self.config = config
        self.name = "default"  # of the adapter, among those of the model (model/named.py)
        self.others: dict[str, Any] = {}  # the model's adapters that are not active, by name; one dictionary for all
        self.names: list[str] = []
        self.rank = 0  # the largest one of the layers
        self.tasks = config.num_tasks or 0
        self.task: int | Tensor | None = None  # the task that evaluation is about (set_task), or one a sample, [B]
        self.of_parameters: list[Callable[[], Tensor]] = []  # each layer's loss on its parameters alone
        self.ranks: Any = None  # the importance of AdaLoRA's triplets (model/rank_allocation.py)
        self.queue: deque[Statistics] = deque(maxlen=config.align_queue)  # statistics of the last micro-batches
        self.disabled = False  # whether the model runs without its adapters (model/disable.py)
        # The steps (AlignStep).
        self.current: Any = None  # between a step's opening and closing
        self.suspended: Any = None  # the current one, while the model runs once more for metrics
        self.in_backward: list[Any] = []  # inside a backward: those that have gradients to hand out
        self.last: Any = None
        self.lm: Tensor | None = None  # the loss of the last training forward, where nothing is added to it
        # The tokens that layers see (tokens.py).
        self.encoder_decoder = False  # whether the model has an encoder and a decoder, whose tokens differ
        self.batch_first = False  # whether a batch with other numbers of samples and tokens has shown it
        self.sources: dict[int, str] = {}  # by layer: where its tokens come from
        # The model.
        self.arguments: tuple[str, ...] = ()  # names of its forward's arguments
        self.handles: tuple[RemovableHandle, ...] = ()  # its forward hooks
        self.report: Any = None  # the ReplaceReport (model/replace.py)
        # The base before training: parameters and buffers that training changes (base_model/modules_to_save.py), and
        # samples of its weights, taken while they were whole (base_model/fingerprint.py).
        self.originals: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor | None] = {}
        self.samples: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        queue: deque[Statistics] = deque(maxlen=self.queue.maxlen)
        step: dict[str, Any] = {
            "current": None,
            "suspended": None,
            "in_backward": [],
            "last": None,
            "lm": None,
            "queue": queue,
        }
        return {**self.__dict__, **step}

    def add_layer(self, name: str, rank: int) -> int:
        """Registers a layer whose outputs a step records; returns its number."""
        self.names.append(name)
        self.rank = max(self.rank, rank)
        return len(self.names) - 1

    def find(self, training: bool = True) -> Any:
        """The step that a layer's forward belongs to; None where it needs none."""
        if self.current is not None:
            return self.current
        if not training:
            return None
        if self.in_backward and torch._C._current_graph_task_id() != -1:
            if len(self.in_backward) == 1:  # recomputation by a checkpoint that BoundCheckpoint does not wrap
                return self.in_backward[0]
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


def require_state(model: nn.Module) -> AlignState:
    """Returns the state of a model's adapters; raises ValueError if it has none."""
    state = find_state(model)
    if state is None:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    return state
