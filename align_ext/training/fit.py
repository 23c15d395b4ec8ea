"""Trains the adapters of a prepared job: its batches, its TrainingArguments, and AlignTrainer."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import transformers
from rich.console import Console
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from align_ext.data.packing import PackedCollator
from align_ext.system import processes
from align_ext.system.bounds import unknown_name
from align_ext.system.ending import deferred
from align_ext.system.messages import shown
from align_ext.system.reading import read_json
from align_ext.system.terminal import Bars, print_line
from align_ext.training.cost import StepClock
from align_ext.training.job import Job
from align_ext.training.options import TrainOptions, arguments_of
from align_ext.training.record import MeasureAdapters
from align_ext.training.report import ShowProgress
from align_ext.training.rows import batches, sampler_of
from align_ext.training.run_folder import RunFolder
from align_ext.training.trainer import AlignTrainer
from align_ext.training.trainer_options import NEEDED, check_field
from align_ext.training.trial import made_arguments
from align_ext.training.whole_checkpoints import step_of

# transformers renamed the argument within version 5 and warns about the old name.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if hasattr(transformers.TrainingArguments, name)
)
# What the run decides: its folder, its upload (a token would stand in its files), its columns and sampler, the lower
# loss as the better one, checkpoints that go on to the bit, how processes join and what a signal does, and what its
# scores are computed in.
_DECIDED = (
    "output_dir", "push_to_hub", "remove_unused_columns", "resume_from_checkpoint", "train_sampling_strategy",
    "auto_find_batch_size", "greater_is_better", "save_only_model", "ignore_data_skip", "label_names",
    "length_column_name", "enable_jit_checkpoint", "fsdp", "ddp_backend", "ddp_timeout", "local_rank",
    "liger_kernel_config", "do_train", "do_eval", "do_predict", "batch_eval_metrics", "bf16_full_eval",
    "fp16_full_eval",
)  # fmt: skip


def argument_fields(options: TrainOptions, device: str) -> dict[str, Any]:
    """Returns the fields of the run's TrainingArguments.

    Args:
        options: the run's options.
        device: "cpu" or "cuda".

    Raises:
        ValueError: an option names what transformers does not know or what is not here; or `trainer` holds a field that
            TrainingArguments does not have, or that another option or the run decides.
    """
    _check_names(options, device)
    own = {
        "per_device_train_batch_size": options.batch_size // processes.count(),
        "logging_first_step": True,
        "eval_strategy": "steps" if options.eval_steps else "no",
        "eval_steps": options.eval_steps or None,
        "save_strategy": "steps" if options.save_steps else "no",
        "save_steps": options.save_steps or options.steps,
        "use_cpu": device == "cpu",
        "seed": options.seed,
        "data_seed": options.order_seed,
        "disable_tqdm": True,
        "ddp_find_unused_parameters": False,  # check_base has seen that each adapter runs
        _CHECKPOINTING: options.gradient_checkpointing or None,
        "fsdp": "full_shard" if options.fsdp else None,
        "liger_kernel_config": {"fused_linear_cross_entropy": False} if options.use_liger_kernel else None,
    } | arguments_of(options)  # fmt: skip
    if options.early_stopping_patience and options.metric_for_best_model is None:
        own["metric_for_best_model"] = "eval_loss"
    own = {name: value for name, value in own.items() if value is not None and value != []}
    known = {entry.name: entry.type for entry in dataclasses.fields(transformers.TrainingArguments)}
    decided = {*own, *arguments_of(options), *_DECIDED}
    for name, value in options.trainer.items():
        if name not in known:
            raise ValueError(unknown_name("field of TrainingArguments", name, sorted(known.keys() - decided)))
        if name in decided or name.startswith("hub_"):
            raise ValueError(f"trainer gives {name}, which another option or the run itself decides: leave it out")
        check_field(name, value, known[name])
        if value is not None and name in NEEDED and not getattr(options, NEEDED[name]):
            raise ValueError(f"trainer: {name} does nothing without {NEEDED[name]}: give that too, or leave it out")
    return own | dict(options.trainer)


def training_arguments(folder: RunFolder, fields: Mapping[str, Any]) -> transformers.TrainingArguments:
    """Returns the arguments of the run's Trainer; they decide how a model that is loaded after them is divided.

    Args:
        folder: the run's folder.
        fields: the result of argument_fields.

    Raises:
        ValueError: TrainingArguments refuses a value.
    """
    if "tensorboard" in fields.get("report_to", ()):
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder.path / "tensorboard")
    return made_arguments(str(folder.checkpoints), fields)


def _check_names(options: TrainOptions, device: str) -> None:
    """Raises ValueError for the name of something that transformers does not know, or that is not here."""
    for name, known in (("optim", OptimizerNames), ("lr_scheduler_type", SchedulerType)):
        names = [kind.value for kind in known]
        if getattr(options, name) not in names:
            raise ValueError(unknown_name(name, getattr(options, name), names))
    for tracker in options.report_to:
        if tracker not in INTEGRATION_TO_CALLBACK:
            raise ValueError(unknown_name("tracker of report_to", tracker, INTEGRATION_TO_CALLBACK))
        if tracker not in get_available_reporting_integrations():
            raise ValueError(f"report_to={tracker} needs its package: pip install {tracker}")
    for name in ("deepspeed", "fsdp_config"):
        if (file := getattr(options, name)) is not None:
            if not Path(file).is_file():
                raise ValueError(f"{name}: there is no file {shown(file)}")
            read_json(Path(file))
    if options.deepspeed is not None and find_spec("deepspeed") is None:
        raise ValueError("--deepspeed cannot be used here: pip install deepspeed")
    if options.fp16 and device == "cpu":
        raise ValueError("--fp16 is for GPUs, and this run is on the CPU: take --bf16, or leave it out")
    if options.fsdp and device == "cpu":
        raise ValueError("--fsdp divides a model among GPUs, and this run is on the CPU: leave it out")
    if options.use_liger_kernel and (device == "cpu" or find_spec("liger_kernel") is None):
        reason = "its kernels run on GPUs alone" if device == "cpu" else "pip install liger-kernel"
        raise ValueError(f"--use-liger-kernel cannot be used here: {reason}")


def fit(job: Job, bars: Bars, console: Console, *, measure: bool = True) -> dict[str, Any]:
    """Trains the adapters; returns the logged losses, measures, held-out losses (eval_steps), and the cost.

    Args:
        job: the run.
        bars: get its progress.
        console: gets lines about it.
        measure: whether the adapters are measured in between, too (MeasureAdapters).
    """
    options, checkpoint = job.options, job.folder.checkpoint
    clock, tokens = StepClock(job.device), trained_tokens(job) / options.steps
    trainer = AlignTrainer(
        model=job.model,
        args=job.arguments,
        train_dataset=job.train_rows,
        eval_dataset=job.dev_rows or job.test_rows,
        data_collator=PackedCollator(job.tokenizer),
        task_names=job.data.names,
        mixing=mixing(job),
        align_schedule=options.align_schedule,
        align_warmup=options.align_warmup,
        callbacks=[clock, ShowProgress(bars, console, options.steps, job.device, tokens)],
    )
    if measure:
        trainer.add_callback(MeasureAdapters(job, console, trainer.callback_handler))
    trainer.remove_callback(transformers.PrinterCallback)
    if options.early_stopping_patience:
        trainer.add_callback(transformers.EarlyStoppingCallback(options.early_stopping_patience))
    if checkpoint is not None:
        print_line(console, f"going on from {checkpoint}")
    with deferred() as signal:
        trainer.add_callback(_EndAfterStep(signal))
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    # What is scored before and after the training is computed alike: without the training's autocast or compiler.
    trainer.accelerator.unwrap_model(job.model, keep_fp32_wrapper=False, keep_torch_compile=False)
    if processes.any_of_all(signal()):
        raise KeyboardInterrupt
    log = trainer.state.log_history
    losses = [entry for entry in log if "loss" in entry]
    begun = 0 if checkpoint is None else step_of(checkpoint)
    return {
        "losses": losses,
        "measures": [entry for entry in log if "adapters" in entry],
        "evaluations": [entry for entry in log if "eval_loss" in entry],
        "cost": clock.cost(losses, tokens),
        "steps": {
            "planned": options.steps,
            "done": trainer.state.global_step,
            "best": trainer.state.best_global_step,
            "begun": begun,
        },
    }


def mixing(job: Job) -> dict[str, Any]:
    """Returns the arguments of the TaskSampler (see rows.batches)."""
    return batches(job.options, job.data, mixed_by(job))


def mixed_by(job: Job) -> Sequence[int]:
    """Returns the task of each row, by which the batches are mixed."""
    return job.mixed_by or job.train_rows["task_ids"]


def trained_tokens(job: Job) -> int:
    """Returns the number of tokens of all training examples that a run trains on, without padding."""
    sampler = sampler_of(job.options, job.data, mixed_by(job))
    return sum(len(job.train_rows[index]["input_ids"]) for index in sampler)


class _EndAfterStep(transformers.TrainerCallback):
    """Writes a checkpoint and ends the training after the step during which any process received a signal."""

    def __init__(self, signal: Callable[[], object]) -> None:
        self.signal = signal

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Checks for the signal."""
        if processes.any_of_all(self.signal()):
            control.should_save = control.should_training_stop = True
