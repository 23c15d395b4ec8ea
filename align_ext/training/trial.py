"""Tries the optimizer and the schedule of a run on one small weight, before its base model is loaded."""

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from align_ext.system.messages import reason_of, shown
from align_ext.training.arguments import align_training_arguments
from align_ext.training.options import TrainOptions

_SEEN = (256, 256)  # shape of the weight
_LOOKED_AT = 100  # steps of a schedule
_DIVIDING = ("deepspeed", "fsdp", "fsdp_config")  # fields that would divide the model that is loaded after them


def made_arguments(folder: str, fields: Mapping[str, Any]) -> transformers.TrainingArguments:
    """Returns TrainingArguments with these fields.

    Raises:
        ValueError: TrainingArguments refuses a value.
    """
    try:
        made = align_training_arguments(folder, **fields)
        made.get_process_log_level()  # this and the rest is what Trainer will ask for
        nothing: Any = [0]
        DataLoader(
            nothing, num_workers=made.dataloader_num_workers, prefetch_factor=made.dataloader_prefetch_factor,
            persistent_workers=made.dataloader_persistent_workers,
            multiprocessing_context=getattr(made, "dataloader_multiprocessing_context", None),
        )  # fmt: skip
        if made.torch_compile:
            torch.compile(nn.Identity(), backend=made.torch_compile_backend or "inductor", mode=made.torch_compile_mode)
        return made
    except Exception as error:  # the libraries behind the options raise anything
        raise ValueError(f"TrainingArguments refuses the options: {reason_of(error)}") from error


def try_arguments(options: TrainOptions, fields: Mapping[str, Any]) -> None:
    """Makes TrainingArguments, optimizer and schedule of a run, and one step of the optimizer.

    Args:
        options: the run's options.
        fields: the fields of its TrainingArguments.

    Raises:
        ValueError: one of them cannot be made, or makes no step here; a field of `trainer` without which it does is
            named.
    """
    try:
        _try(options, fields)
    except ValueError as error:
        blamed = next((name for name in options.trainer if _works_without(name, options, fields)), None)
        if blamed is None:
            raise
        given = f"--trainer {blamed}={shown(options.trainer[blamed])}"
        raise ValueError(f"{given} cannot be used: change it, or leave it out ({error})") from error


def _works_without(name: str, options: TrainOptions, fields: Mapping[str, Any]) -> bool:
    with suppress(ValueError):
        _try(options, {other: value for other, value in fields.items() if other != name})
        return True
    return False


def _try(options: TrainOptions, fields: Mapping[str, Any]) -> None:
    small = {name: value for name, value in fields.items() if name not in _DIVIDING}
    with tempfile.TemporaryDirectory() as folder:
        arguments = made_arguments(folder, small)
        if options.deepspeed is not None:
            _try_deepspeed(options, arguments)
        if arguments.optim_target_modules is not None:  # which names layers of the real model
            _try_projecting(options, arguments)
            return
        try:
            optimizer, _ = stepped_optimizer(arguments)
        except Exception as error:  # of any package
            raise ValueError(f"--optim {options.optim} cannot be used here: {reason_of(error)}") from error
        if arguments.optim_args and _optimizer(arguments) == _optimizer(replace(arguments, optim_args=None)):
            raise ValueError(f"optim_args={shown(arguments.optim_args)} change nothing of --optim {options.optim}")
        try:
            schedule = transformers.get_scheduler(
                options.lr_scheduler_type, optimizer, arguments.get_warmup_steps(options.steps), options.steps,
                arguments.lr_scheduler_kwargs,
            )  # fmt: skip
            _check_rates(schedule, options.steps)
        except Exception as error:  # TypeErrors, for example, where an argument is missing
            raise ValueError(
                f"--lr-scheduler-type {options.lr_scheduler_type} cannot be used: {reason_of(error)}; what it takes is "
                "given as --trainer 'lr_scheduler_kwargs={name: value, ...}'"
            ) from error


def _check_rates(schedule: Any, steps: int) -> None:
    """Raises ValueError if the learning rate of some of the steps is negative or above the peak."""
    for factor in getattr(schedule, "lr_lambdas", ()):  # some schedules go by what is evaluated
        for step in {*range(min(steps, _LOOKED_AT)), *(steps * part // _LOOKED_AT for part in range(_LOOKED_AT))}:
            if not 0 <= factor(step) <= 1 + 1e-6:
                raise ValueError(f"the learning rate of step {step} would be {factor(step):g} times its peak")


def _try_projecting(options: TrainOptions, arguments: transformers.TrainingArguments) -> None:
    """Raises ValueError for optim_target_modules of an optimizer that takes none, or whose package is missing."""
    if not options.optim.startswith(("galore", "apollo")):
        raise ValueError(f"optim_target_modules do nothing with --optim {options.optim}: galore and apollo take them")
    try:
        _optimizer(arguments)
    except ImportError as error:
        raise ValueError(f"--optim {options.optim} cannot be used here: {reason_of(error)}") from error
    except ValueError:  # there are no such layers here
        return


def _try_deepspeed(options: TrainOptions, arguments: transformers.TrainingArguments) -> None:
    """Raises ValueError for a configuration that DeepSpeed refuses, or that says something else than the options."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig, unset_hf_deepspeed_config

    try:
        made = HfTrainerDeepSpeedConfig(options.deepspeed)
        if "zero_optimization" not in made.config:
            raise ValueError("it has no zero_optimization, which names the stage")
        made.config.pop("scheduler", None)  # whose values depend on the number of steps
        made.trainer_config_process(arguments)
        made.trainer_config_finalize(arguments, _OfSize(), options.steps)
        if (
            "train_micro_batch_size_per_gpu" in made.config
        ):  # the product goes by the processes that DeepSpeed has joined
            made.config.pop("train_batch_size", None)
        DeepSpeedConfig(made.config)
    except Exception as error:  # asserts, and errors of pydantic
        raise ValueError(f"--deepspeed {options.deepspeed} cannot be used: {reason_of(error)}") from error
    finally:
        unset_hf_deepspeed_config()


class _OfSize(nn.Module):
    """Stands for a model by whose hidden size transformers fills in sizes of buckets."""

    config = transformers.PretrainedConfig(hidden_size=_SEEN[0])


def _optimizer(arguments: transformers.TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """Returns the class and the options of the optimizer."""
    layer = nn.Linear(*_SEEN, bias=False, device=arguments.device)
    return transformers.Trainer.get_optimizer_cls_and_kwargs(arguments, layer)


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
