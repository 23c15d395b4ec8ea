"""The options of the training job that go to transformers' TrainingArguments, or that Trainer's callbacks take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_origin

from align_ext.system.bounds import (
    Rule,
    documented,
    integer_rule,
    is_number,
    is_positive,
    not_negative,
    option,
    positive,
    unknown_name,
)
from align_ext.system.messages import shown
from align_ext.training.option_values import alternatives

_TYPES = {
    bool: "true or false", int: "a whole number", float: "a number", str: "text", list: "a list [x, y]",
    dict: "values by name {x: 1, y: 2}", type(None): "none",
}  # fmt: skip
_PAIRS = re.compile(r"\s*\w+\s*=[^,=]+(,\s*\w+\s*=[^,=]+)*")


def check_field(name: str, value: Any, kind: Any) -> None:
    """Raises ValueError unless a value of `trainer` is of its type, which TrainingArguments itself does not check.

    Args:
        name: the field of TrainingArguments.
        value: what is given, as YAML reads it.
        kind: the type of the field.
    """
    origins = ((one, get_origin(one)) for one in alternatives(kind))
    kinds: set[Any] = {bool if origin is Literal else origin or one for one, origin in origins}  # Literal[False]
    members: list[Any] = [member for one in kinds if isinstance(one, type) and issubclass(one, Enum) for member in one]
    if members and value not in members:
        raise ValueError(unknown_name(f"value of trainer's {name}", value, [member.value for member in members]))
    is_file = isinstance(value, str) and Path(value).is_file()
    known = [one for one in _TYPES if one in kinds and (one is not str or dict not in kinds or is_file)]
    wanted = " or ".join(_TYPES[one] for one in known)
    if name == "optim_args" and value is not None:
        wanted = 'name=value, several in quotes: optim_args="x=1,y=2"'
        known = [str] if isinstance(value, str) and _PAIRS.fullmatch(value) else []
    allowed = None if value is None else _BOUNDS.get(name, _anything)(value)
    if type(value) not in known and not (type(value) is int and float in known):
        allowed = wanted
    if allowed:
        raise ValueError(f"trainer: {name} must be {allowed}, got {shown(value)}")


def fraction(value: Any) -> str | None:
    """Checks for a fraction."""
    return None if is_number(value) and 0 <= value < 1 else "in [0, 1)"


def _anything(_: Any) -> None:
    return None


def _up_to(largest: float) -> Rule:
    """Returns the rule of a positive number that is at most so large."""
    return lambda value: None if is_positive(value) and value <= largest else f"a positive number, at most {largest:g}"


def _one_of(*words: Any) -> Rule:
    """Returns the rule of a field that takes these values alone."""
    return lambda value: None if value in words else f"one of {', '.join(map(str, words))}"


def _steps_or_fraction(value: Any) -> str | None:
    """Checks for a fraction of the steps or a number of steps."""
    steps = is_number(value) and 1 <= value <= 10**9 and value == int(value)
    return None if steps or 0 <= value < 1 else "in [0, 1), or a number of steps"


def _words(*known: str) -> Rule:
    """Returns the rule of values by the names of these alone."""
    return lambda value: f"by the names {', '.join(known)}" if {*value} - {*known} else None


_COUNT = integer_rule(maximum=10**9)
_LEVEL = _one_of("detail", "debug", "info", "warning", "error", "critical", "passive")
_RECOMPUTING = _words("use_reentrant", "preserve_rng_state", "determinism_check", "debug", "early_stop")
# What the values of `trainer` must be beside their type; TrainingArguments itself checks few of them.
_BOUNDS: dict[str, Rule] = {
    "label_smoothing_factor": fraction, "neftune_noise_alpha": not_negative, "warmup_ratio": fraction,
    "eval_delay": not_negative, "eval_accumulation_steps": _COUNT, "torch_empty_cache_steps": _COUNT,
    "dataloader_prefetch_factor": _COUNT, "ddp_bucket_cap_mb": _COUNT, "log_level": _LEVEL, "log_level_replica": _LEVEL,
    "include_num_input_tokens_seen": _one_of("all", "non_padding", "no", True, False),
    "activation_checkpointing_kwargs": _RECOMPUTING, "gradient_checkpointing_kwargs": _RECOMPUTING,
}  # fmt: skip
# The option without which a value of `trainer` does nothing.
NEEDED = {
    "activation_checkpointing_kwargs": "gradient_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "eval_delay": "eval_steps",
    "eval_accumulation_steps": "eval_steps",
    "project": "report_to",
    "trackio_space_id": "report_to",
    "trackio_bucket_id": "report_to",
    "trackio_static_space_id": "report_to",
}


@documented
@dataclass(frozen=True)
class TrainerOptions:
    """How the adapters are trained: steps, optimizer, precision, processes, logs and checkpoints."""

    steps: int = option(40, "optimizer steps", integer_rule(maximum=10**9), "max_steps")
    epochs: float | None = option(
        None, "passes over the training examples, in place of steps; none: steps", positive, "num_train_epochs"
    )
    batch_size: int = option(8, "examples in a micro-batch, of all processes together", integer_rule(maximum=10**6))
    per_device_train_batch_size: int | None = option(
        None,
        "examples of each process in a micro-batch, in place of batch_size; none: batch_size",
        integer_rule(maximum=10**6, none=True),
    )
    accumulation: int = option(1, "micro-batches in a step", integer_rule(maximum=10**6), "gradient_accumulation_steps")
    lr: float = option(2e-4, "peak learning rate", _up_to(1000), "learning_rate")
    warmup: float = option(
        0.03,
        "share of the steps, or from 1 on their number, in which the learning rate rises",
        _steps_or_fraction,
        "warmup_steps",
    )
    lr_scheduler_type: str = option(
        "cosine",
        "how the learning rate falls after that: cosine, linear, constant_with_warmup, ...",
        None,
        "lr_scheduler_type",
    )
    optim: str = option(
        "adamw_torch_fused",
        "optimizer: adamw_torch_fused, adamw_8bit (bitsandbytes), adafactor, sgd, lion_8bit, ...",
        None,
        "optim",
    )
    weight_decay: float = option(0.0, "decoupled weight decay of the optimizer", not_negative, "weight_decay")
    adam_beta1: float = option(0.9, "decay of Adam's mean of gradients", fraction, "adam_beta1")
    adam_beta2: float = option(0.999, "decay of Adam's mean of squared gradients", fraction, "adam_beta2")
    adam_epsilon: float = option(1e-8, "added to the root in Adam's denominator", _up_to(1), "adam_epsilon")
    max_grad_norm: float = option(
        1.0, "largest norm of the gradient, to which it is scaled down; 0: no limit", not_negative, "max_grad_norm"
    )
    eval_batch_size: int = option(
        16, "rows in a forward of the evaluation", integer_rule(maximum=10**6), "per_device_eval_batch_size"
    )
    bf16: bool = option(False, "compute in bfloat16 by autocast, beside weights in --dtype", None, "bf16")
    fp16: bool = option(False, "compute in float16 by autocast with a scaled loss; GPU", None, "fp16")
    tf32: bool | None = option(
        None, "multiply float32 matrices in TF32 on GPUs that can; none: torch's setting", None, "tf32"
    )
    gradient_checkpointing: bool = option(False, "recompute activations in the backward pass to save memory")
    torch_compile: bool = option(False, "compile the model's layers by torch.compile", None, "torch_compile")
    use_liger_kernel: bool = option(
        False,
        "take Liger's kernels for the frozen part of the model, where liger-kernel is installed; GPU",
        None,
        "use_liger_kernel",
    )
    dataloader_num_workers: int = option(
        0, "processes that prepare batches beside the training", integer_rule(0, 1000), "dataloader_num_workers"
    )
    fsdp: bool = option(
        False, "divide parameters and optimizer among the processes by FSDP2; GPU (fsdp_config refines it)"
    )
    fsdp_config: str | None = option(None, "JSON file of fsdp_config of TrainingArguments", None, "fsdp_config")
    deepspeed: str | None = option(None, "JSON file of DeepSpeed's configuration (ZeRO-2, ZeRO-3)", None, "deepspeed")
    trainer: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "further fields of transformers' TrainingArguments, as name=value separated by commas"},
    )
    log_steps: int = option(5, "log the losses every so many steps", integer_rule(maximum=10**9), "logging_steps")
    report_to: tuple[str, ...] = option(
        (),
        "trackers that get the losses and, after each quarter, the divergence of tasks and the routing, separated by "
        "commas: tensorboard, wandb, trackio, mlflow, ...; none: none",
        None,
        "report_to",
    )
    run_name: str | None = option(None, "name of the run in the tracker; none: the output folder's", None, "run_name")
    eval_steps: int = option(
        0, "log the held-out examples' losses every so many steps; 0: before and after alone", integer_rule(0, 10**9)
    )
    save_steps: int = option(0, "write a checkpoint every so many steps; 0: none", integer_rule(0, 10**9))
    save_total_limit: int = option(
        2, "how many checkpoints to keep, the last ones and the best", integer_rule(1, 10**6), "save_total_limit"
    )
    load_best_model_at_end: bool = option(
        False,
        "keep the adapter of the checkpoint with the best metric; needs eval_steps and save_steps",
        None,
        "load_best_model_at_end",
    )
    metric_for_best_model: str | None = option(
        None, "what is best: eval_loss, or eval_loss/TASK; none: eval_loss", None, "metric_for_best_model"
    )
    early_stopping_patience: int = option(
        0, "end the training after so many evaluations without a better metric; 0: never", integer_rule(0, 10**6)
    )

    def check_trainer(self) -> None:
        """Raises ValueError for options that exclude or need each other."""
        for first, second in (("bf16", "fp16"), ("fsdp", "deepspeed")):
            if getattr(self, first) and getattr(self, second):
                raise ValueError(f"{first} and {second} exclude each other: keep one")
        if self.load_best_model_at_end or self.early_stopping_patience:
            option = "load_best_model_at_end" if self.load_best_model_at_end else "early_stopping_patience"
            if not self.eval_steps or not self.save_steps or self.save_steps % self.eval_steps:
                raise ValueError(
                    f"{option} needs eval_steps, and save_steps that is a multiple of it, got eval_steps="
                    f"{self.eval_steps} and save_steps={self.save_steps}"
                )
        if self.lr * self.weight_decay >= 1:
            raise ValueError(
                f"weight_decay={self.weight_decay:g} times lr={self.lr:g} is the share of a weight that a step takes "
                "away, and must be below 1: lower one of them"
            )
        delay: Any = self.trainer.get("eval_delay")
        if self.epochs is None and is_number(delay) and delay > self.steps:
            raise ValueError(f"trainer: eval_delay={delay} is more than the {self.steps} steps: lower it")
        if self.fsdp_config is not None and not self.fsdp:
            raise ValueError("fsdp_config goes with fsdp: give --fsdp")
