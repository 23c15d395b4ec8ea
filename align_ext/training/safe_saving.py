"""A Trainer that writes checkpoints atomically, claims its folder, and stops when the training diverges."""

import random
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME

from align_ext.system.locks import claimed
from align_ext.system.messages import reason_of, shown
from align_ext.training.repartition import UNIVERSAL, check_division, divide_steps, join_alone, repartitioned
from align_ext.training.whole_checkpoints import WRITING, check_whole, clean, keep_last, last_checkpoint, publish

_Base: Any = Trainer if TYPE_CHECKING else object  # tells mypy which methods the mixin may call


class Diverged(FloatingPointError):
    """Raised if a loss, a gradient or a parameter is not finite; the message is complete and needs no traceback."""


def seed_process(args: Any, step: int) -> None:
    """Seeds torch's generators for the steps after a step, in each process with another number, for other masks."""
    if args.process_index or step:
        torch.manual_seed(random.Random(f"{args.seed} {args.process_index} {step}").getrandbits(63))


class SafeMixin(_Base):
    """Limits what an end at any moment can lose to the steps since the last checkpoint.

    Checkpoints are written to a temporary folder and renamed when they are complete (training/whole_checkpoints.py).
    Resuming from an incomplete one is refused; resume_from_checkpoint=True means the last complete one. If checkpoints
    are written, output_dir is claimed while train() runs. Training stops before a step whose loss or gradient norm is
    not finite, except for steps that float16's gradient scaler skips. If Trainer does not wait for the device in each
    step (logging_nan_inf_filter=False on a GPU), neither does this: the check then happens at the next log, evaluation
    or checkpoint. A checkpoint never holds values that are not finite.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._writing: Path | None = None
        self._finite = _FiniteRecord()
        super().__init__(*args, **kwargs)
        self.add_callback(_BeforeStep(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Trains like Trainer.train.

        Raises:
            Diverged: a loss, a gradient or a parameter is not finite.
            ValueError: another process writes to output_dir, or there is no complete checkpoint to resume from.
        """
        folder, self._finite = Path(self.args.output_dir), _FiniteRecord()
        if self.is_deepspeed_enabled:
            join_alone()
        with ExitStack() as stack:
            if self.args.save_strategy != "no" and self.args.should_save:
                stack.enter_context(claimed(folder.absolute()))
                clean(folder)
            if resume_from_checkpoint is True:
                if (last := last_checkpoint(folder)) is None:
                    raise ValueError(f"there is no whole checkpoint in {shown(str(folder))} to go on from")
                resume_from_checkpoint = str(last)
            elif resume_from_checkpoint:
                check_whole(Path(resume_from_checkpoint))
            if resume_from_checkpoint:
                check_division(self, Path(resume_from_checkpoint))
            if resume_from_checkpoint and self.is_deepspeed_enabled:
                resume_from_checkpoint = stack.enter_context(repartitioned(self, Path(resume_from_checkpoint)))
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._check_parameters()
            return result

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and Path(checkpoint).name == UNIVERSAL:
            divide_steps(self.optimizer)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        with repartitioned(self, Path(best)) if self.is_deepspeed_enabled else nullcontext(best) as folder:
            self.state.best_model_checkpoint = folder
            super()._load_best_model()
            self.state.best_model_checkpoint = best

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        name = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        if checkpoint is not None and not Path(checkpoint, name).exists():  # it was another number of processes
            seed_process(self.args, self.state.global_step)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Runs Trainer's method and records whether the loss is finite."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._finite.record(0, loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        norm = super()._get_grad_norm(model, *args, **kwargs)
        if norm is not None and not self.is_deepspeed_enabled:  # DeepSpeed skips such steps itself
            self._finite.record(1, torch.as_tensor(norm))
        return norm

    def _before_step(self, model: nn.Module) -> None:
        if not hasattr(super(), "_get_grad_norm"):  # transformers before 5.6 does not provide the norm
            gradients = [_local(p.grad) for p in model.parameters() if p.grad is not None]
            self._finite.record(1, torch.nn.utils.get_total_norm(gradients))
        self._finite.end_step(self.state.global_step + 1)
        if self.args.device.type == "cpu" or self.args.logging_nan_inf_filter or self._scaler() is not None:
            self._check_finite()

    def _scaler(self) -> Any:
        return getattr(self.accelerator, "scaler", None)

    def _check_finite(self) -> None:
        """Stops all processes if a loss or a gradient of one of them was not finite."""
        if (found := self._finite.is_writer) is None:
            return
        loss, gradient = self.accelerator.gather(found[None]).amax(0).tolist()
        if gradient and not loss and self._scaler() is not None and self._scaler().get_scale() > 1:
            self._finite = _FiniteRecord()  # float16 overflowed: the scaler skips the step and lowers its scale
        elif loss or gradient:
            raise _diverged("the loss" if loss else "the norm of the gradient", loss or gradient)

    def _check_parameters(self) -> None:
        """Stops if a loss or a gradient was not finite, or a trained parameter is not."""
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
        is_writer = self.args.should_save or self.args.local_process_index == 0
        try:
            if is_writer:
                clean(folder)
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
            if is_writer and new.is_dir():  # this machine does not share the first machine's disk
                publish(new, folder / name)
        except (OSError, RuntimeError, SafetensorError) as error:  # torch.save raises RuntimeError for a full disk
            raise OSError(
                f"the checkpoint {shown(str(folder / name))} cannot be written: {reason_of(error)}"
            ) from error
        finally:
            self._writing = None
            if is_writer:
                clean(folder)


class _BeforeStep(TrainerCallback):
    """Gives each process its own dropout, and checks losses and gradients before the optimizer makes a step."""

    def __init__(self, trainer: SafeMixin) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Seeds the process's generators, which a resumed run then restores."""
        seed_process(args, 0)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Stops the training if they are not finite."""
        self.trainer._before_step(model)


class _FiniteRecord:
    """Records on the device the first step with a loss, and the first with a gradient norm, that is not finite.

    Attributes:
        first: [2], the steps for losses and norms, 0 for none; None before the first step.
    """

    def __init__(self) -> None:
        self.is_writer: Tensor | None = None
        self._bad: list[list[Tensor]] = [[], []]  # flags of the current step, for losses and norms

    def record(self, which: int, value: Tensor) -> None:
        """Records a loss (0) or a gradient norm (1) of the current step, [] or [n]."""
        self._bad[which].append(~torch.isfinite(_local(value.detach())).all())

    def end_step(self, step: int) -> None:
        """Stores the step's number if a value was not finite."""
        device = (self._bad[0] or self._bad[1])[0].device
        flags = [torch.stack([b.to(device) for b in bad]).any() if bad else None for bad in self._bad]
        no_flag = torch.zeros((), dtype=torch.bool, device=device)
        steps = torch.stack([no_flag if bad is None else bad for bad in flags]) * step
        self.is_writer = steps if self.is_writer is None else torch.where(self.is_writer > 0, self.is_writer, steps)
        self._bad = [[], []]


def _local(tensor: Tensor) -> Tensor:
    """Returns this process's shard of a tensor, or the tensor itself."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _diverged(what: str, step: int) -> Diverged:
    return Diverged(
        f"training has diverged: {what} is not finite at step {step}; lower the learning rate or the alignment's "
        "weight, warm up longer, or train in a dtype of a wider range"
    )
