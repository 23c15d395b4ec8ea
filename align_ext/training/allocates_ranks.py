"""Allocates the ranks of AdaLoRA in a Trainer, after each optimizer step."""

import warnings
from typing import Any

from torch import nn
from transformers import TrainerCallback

from align_ext.adapters.adalora import ranks_above_target
from align_ext.adapters.adapted_block import adapted_layers
from align_ext.alignment.model_state import AlignState, find_state
from align_ext.model.rank_allocation import rank_schedule, update_and_allocate


def check_ranks(model: nn.Module, steps: int, *, divided: bool) -> None:
    """Checks that a training can allocate the ranks of adalora; does nothing for other architectures.

    Args:
        model: the model.
        steps: the optimizer steps of the training.
        divided: whether DeepSpeed or FSDP divide the gradients among processes.

    Raises:
        ValueError: they do, or tinit, tfinal and total_step do not fit the steps.
    """
    state = find_state(model)
    if state is None or state.config.architecture != "adalora":
        return
    if divided:
        raise ValueError(
            "adalora needs the gradients of whole matrices, which DeepSpeed and FSDP keep in parts: train with DDP"
        )
    if (end := rank_schedule(model, steps).end) > steps:
        raise ValueError(
            f"the training has {steps} optimizer steps, and by total_step and tfinal the ranks are final at step "
            f"{end}: leave total_step out, or train for longer"
        )


class AllocatesRanks(TrainerCallback):
    """Calls update_and_allocate (model/rank_allocation.py) after each optimizer step of adalora."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def _state(self) -> AlignState | None:
        """The state of the model's adapters, if their ranks are allocated."""
        state = find_state(self.trainer.model)
        return state if state is not None and state.config.architecture == "adalora" else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Checks that the ranks can be allocated (check_ranks), and forgets those of a training before this one."""
        divided = self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled
        check_ranks(self.trainer.model, state.max_steps, divided=divided)
        if state.global_step == 0 and (adapters := self._state()) is not None:
            adapters.ranks = None

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Allocates, unless the step was skipped since its gradients overflowed in float16."""
        if self._state() is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            update_and_allocate(self.trainer.model, state.global_step + 1, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warns of ranks that are not final: the training stopped before, or went back to its best checkpoint."""
        if (adapters := self._state()) is None or not state.is_world_process_zero:
            return
        layers = [layer.adapter for layer in adapted_layers(self.trainer.model).values()]
        if said := ranks_above_target(layers, adapters.config):
            end = rank_schedule(self.trainer.model, state.max_steps).end
            warnings.warn(
                f"{said}: the training ended, or its best checkpoint is from, before step {end}, from which on they "
                "are final; let it reach that, or choose a larger tfinal",
                stacklevel=2,
            )
