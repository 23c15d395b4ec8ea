"""Allocates the ranks of AdaLoRA in a Trainer, after each optimizer step."""

from typing import Any

from transformers import TrainerCallback

from align_ext.alignment.model_state import AlignState, find_state
from align_ext.model.rank_allocation import rank_schedule, update_and_allocate


class AllocatesRanks(TrainerCallback):
    """Calls update_and_allocate (model/rank_allocation.py) after each optimizer step of adalora."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def _state(self) -> AlignState | None:
        """The state of the model's adapters, if their ranks are allocated."""
        state = find_state(self.trainer.model)
        return state if state is not None and state.config.architecture == "adalora" else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Checks that the schedule fits the training, and that this process sees all gradients.

        Raises:
            ValueError: DeepSpeed or FSDP hold them, or the training ends before the ranks are final.
        """
        if (adapters := self._state()) is None:
            return
        if self.trainer.is_deepspeed_enabled or self.trainer.is_fsdp_enabled:
            raise ValueError(
                "adalora needs the gradients of whole matrices, which DeepSpeed and FSDP keep in parts: train with DDP"
            )
        if state.global_step == 0:
            adapters.ranks = None  # of a training before this one
        if (end := rank_schedule(self.trainer.model, state.max_steps).end) > state.max_steps:
            raise ValueError(
                f"the training has {state.max_steps} optimizer steps, and by total_step and tfinal the ranks are final "
                f"at step {end}: leave total_step out, or train for longer"
            )

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Allocates, unless the step was skipped since its gradients overflowed in float16."""
        if self._state() is not None and not self.trainer.accelerator.optimizer_step_was_skipped:
            update_and_allocate(self.trainer.model, state.global_step + 1, state.max_steps)
