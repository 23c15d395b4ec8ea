"""Tries the optimizer and the schedule of a run on one small weight, before its base model is loaded."""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn

from align_ext.system.messages import reason_of
from align_ext.training.options import TrainOptions
from align_ext.training.trainer import align_training_arguments

_SEEN = (256, 256)  # shape of the weight
_DIVIDING = ("deepspeed", "fsdp", "fsdp_config")  # fields that would divide the model that is loaded after them


def made_arguments(folder: str, fields: Mapping[str, Any]) -> transformers.TrainingArguments:
    """Returns TrainingArguments with these fields.

    Raises:
        ValueError: TrainingArguments refuses a value.
    """
    try:
        return align_training_arguments(folder, **fields)
    except Exception as error:  # the libraries behind the options raise anything
        raise ValueError(f"TrainingArguments refuses the options: {reason_of(error)}") from error


def try_arguments(options: TrainOptions, fields: Mapping[str, Any]) -> None:
    """Makes TrainingArguments, optimizer and schedule of a run, and one step of the optimizer.

    Args:
        options: the run's options.
        fields: the fields of its TrainingArguments.

    Raises:
        ValueError: one of them cannot be made, or makes no step here.
    """
    small = {name: value for name, value in fields.items() if name not in _DIVIDING}
    with tempfile.TemporaryDirectory() as folder:
        arguments = made_arguments(folder, small)
        if arguments.optim_target_modules is not None:  # which names layers of the real model
            return
        try:
            optimizer, _ = stepped_optimizer(arguments)
        except Exception as error:  # of any package
            raise ValueError(f"--optim {options.optim} cannot be used here: {reason_of(error)}") from error
        try:
            transformers.get_scheduler(
                options.lr_scheduler_type, optimizer, arguments.get_warmup_steps(options.steps), options.steps,
                arguments.lr_scheduler_kwargs,
            )  # fmt: skip
        except Exception as error:  # TypeErrors, for example, where an argument is missing
            raise ValueError(
                f"--lr-scheduler-type {options.lr_scheduler_type} cannot be used: {reason_of(error)}; what it takes is "
                "given as --trainer 'lr_scheduler_kwargs={name: value, ...}'"
            ) from error


def stepped_optimizer(arguments: transformers.TrainingArguments) -> tuple[torch.optim.Optimizer, torch.Tensor]:
    """Returns the optimizer of TrainingArguments after one step, and the weight that it trains."""
    layer = nn.Linear(*_SEEN, bias=False, device=arguments.device)
    kind, options = transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, layer)
    optimizer = kind(**{"params": layer.parameters(), **options})
    if callable(getattr(optimizer, "train", None)):  # of the schedule-free ones
        optimizer.train()
    layer.weight.grad = torch.ones_like(layer.weight)
    optimizer.step()
    return optimizer, layer.weight
