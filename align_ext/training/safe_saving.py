"""A Trainer that loses nothing: its checkpoints are whole, its folder is its own, and it ends when it diverges."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from align_ext.system.reading import reason_of, shown
from align_ext.system.writing import claimed
from align_ext.training.whole_checkpoints import WRITING, check_whole, clear, keep_last, last_checkpoint, publish

_Base: Any = Trainer if TYPE_CHECKING else object  # what a mixin may call


class Diverged(FloatingPointError):
    """A loss, a gradient or a parameter is not finite; the message is the whole answer."""


class SafeMixin(_Base):
    """What a Trainer does so that an end at any moment loses no more than the steps since the last checkpoint.

    Checkpoints are written beside their place and renamed when they are whole (training/whole_checkpoints.py), and
    resuming from one that is not is refused; resume_from_checkpoint=True means the last whole one. Where checkpoints
    are written, output_dir is claimed while train() runs. Training stops, before the step is made, when the loss or the
    norm of the gradient is not finite; float16's skipped steps, whose scale is to be lowered, are no such case. Where
    Trainer does not wait for the device in each step (logging_nan_inf_filter=False on a GPU) neither does this: there
    it is found when a log, an evaluation or a checkpoint is due. A checkpoint never holds what is not finite.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writing: Path | None = None
        self._finite = _Finite()
        super().__init__(*args, **kwargs)
        self.add_callback(_BeforeStep(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains, as Trainer does.

        Raises:
            Diverged: a loss, a gradient or a parameter is not finite.
            ValueError: another process writes to output_dir, or there is no whole checkpoint to go on from.
        """
        folder, self._finite = Path(self.args.output_dir), _Finite()
        with ExitStack() as held:
            if self.args.save_strategy != "no" and self.args.should_save:
                held.enter_context(claimed(folder.absolute()))
                clear(folder)
            if resume_from_checkpoint is True:
                if (last := last_checkpoint(folder)) is None:
                    raise ValueError(f"there is no whole checkpoint in {shown(str(folder))} to go on from")
                resume_from_checkpoint = str(last)
            elif resume_from_checkpoint:
                check_whole(Path(resume_from_checkpoint))
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._check_parameters()
            return result

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Trainer's; its loss is looked at before the step is made."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._finite.see(0, loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(model, *args, **kwargs)
        if norm is not None and not self.is_deepspeed_enabled:  # which skips steps of its own
            self._finite.see(1, torch.as_tensor(norm))
        return norm

    def _before_step(self, model: nn.Module) -> None:
        if not hasattr(super(), "_get_grad_norm"):  # before transformers 5.6 nothing gives the norm away
            gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
            self._finite.see(1, torch.nn.utils.get_total_norm(gradients))
        self._finite.end_step(self.state.global_step + 1)
        if self.args.device.type == "cpu" or self.args.logging_nan_inf_filter or self._scaler() is not None:
            self._check_finite()

    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _check_finite(self) -> None:
        """Stops all processes alike if a loss or a gradient of one of them was not finite."""
        if (found := self._finite.first) is None:
            return
        loss, gradient = self.accelerator.gather(found[None]).amax(0).tolist()
        if gradient and not loss and self._scaler() is not None and self._scaler().get_scale() > 1:
            self._finite = _Finite()  # too large for float16 as it is scaled: the scaler skips the step and lowers it
        elif loss or gradient:
            raise _diverged("the loss" if loss else "the norm of the gradient", loss or gradient)

    def _check_parameters(self) -> None:
        """Stops if a loss or a gradient was not finite, or what is trained is not."""
        self._check_finite()
        bad = [~torch.isfinite(_local(p)).all() for p in self.model.parameters() if p.requires_grad]
        if bad and bool(self.accelerator.gather(torch.stack([b.to(bad[0].device) for b in bad])).any()):
            raise _diverged("a trained parameter", self.state.global_step)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        if self.control.should_log or self.control.should_evaluate or self.control.should_save:
            self._check_finite()
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return folder if self._writing is None else str(self._writing)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._check_parameters()
        folder, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        new = folder / WRITING / name
        first = self.args.should_save or self.args.local_process_index == 0
        try:
            if first:
                clear(folder)
                new.mkdir(parents=True, exist_ok=True)
            self.accelerator.wait_for_everyone()
            self._writing = new.parent
            super()._save_checkpoint(model, trial)
            if self.state.best_model_checkpoint == str(new):
                self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(new / TRAINER_STATE_NAME))
                self.accelerator.wait_for_everyone()
                publish(new, folder / name)
                keep_last(folder, self.args.save_total_limit, (name, self.state.best_model_checkpoint))
            else:
                self.accelerator.wait_for_everyone()
            self.accelerator.wait_for_everyone()
            if first and new.is_dir():  # another machine's own disk
                publish(new, folder / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save has no better for a full disk
            raise OSError(
                f"the checkpoint {shown(str(folder / name))} cannot be written: {reason_of(error)}"
            ) from error
        finally:
            self._writing = None
            if first:
                clear(folder)


class _BeforeStep(TrainerCallback):
    """Looks at the losses and gradients of a step before it is made."""

    def __init__(self, trainer: SafeMixin) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Stops the training if they are not finite."""
        self.trainer._before_step(model)


class _Finite:
    """The first step at which a loss, and at which the norm of a gradient, was not finite; kept on the device.

    Attributes:
        first: [2], 0 where there was none; None before the first step.
    """

    def __init__(self) -> None:
        self.first: Tensor | None = None
        self._bad: list[list[Tensor]] = [[], []]  # of the step under way

    def see(self, which: int, value: Tensor) -> None:
        """Looks at a loss (0) or a gradient's norm (1) of the step under way, [] or [n]."""
        self._bad[which].append(~torch.isfinite(_local(value.detach())).all())

    def end_step(self, step: int) -> None:
        """Keeps the step's number where something was not finite."""
        device = (self._bad[0] or self._bad[1])[0].device
        seen = [torch.stack([b.to(device) for b in bad]).any() if bad else None for bad in self._bad]
        none = torch.zeros((), dtype=torch.bool, device=device)
        now = torch.stack([none if bad is None else bad for bad in seen]) * step
        self.first = now if self.first is None else torch.where(self.first > 0, self.first, now)
        self._bad = [[], []]


def _local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is in shards."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _diverged(what: str, step: int) -> Diverged:
    return Diverged(
        f"training has diverged: {what} is not finite at step {step}; lower the learning rate or the alignment's "
        "weight, warm up longer, or train in a dtype of a wider range"
    )
