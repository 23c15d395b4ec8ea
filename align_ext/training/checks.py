"""Checks of a Trainer with alignment before its first step, and warnings after its first logs and its last step."""

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.alignment.model_state import find_state
from align_ext.base_model.select_layers import embeddings_of
from align_ext.base_model.sharded import unwrapped
from align_ext.data.join_tasks import example_tasks
from align_ext.system.messages import shown

_TRAINER_METRICS = ("loss", "runtime", "samples_per_second", "steps_per_second", "epoch")
_NOT_OPTIMIZED = "the optimizer does not have it: give it all parameters that require gradients"
_FUSED = "fused_linear_cross_entropy"
_FIRST_LOGS, _FAR = 3, 3.0  # logs of which the mean is looked at; times the model's own loss
_TASK_LOSS = re.compile(r"(^|_)loss/")


class ChecksBeforeTraining(TrainerCallback):
    """Runs the checks after the optimizer is made and before the first step."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Runs the checks."""
        trainer = self.trainer
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled  # the optimizer holds shards of parameters
        check_trained(trainer.model, None if sharded else trainer.optimizer)
        check_metric(trainer)
        refuse_fused_head(args, trainer.model)


class LayersThatNeverRan(TrainerCallback):
    """Warns after the training about adapters that got no gradient in any step.

    With DeepSpeed there is no warning, since it holds the gradients.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._idle: dict[str, nn.Module] = {}
        self._stepped = False  # a run that is resumed at its end makes no step

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts with all adapters."""
        self._stepped = False
        layers = {} if self.trainer.is_deepspeed_enabled else adapted_layers(self.trainer.model)
        self._idle = {name: layer.adapter for name, layer in layers.items()}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removes the adapters that have a gradient."""
        self._stepped = True
        self._idle = {
            name: adapter for name, adapter in self._idle.items() if all(p.grad is None for p in adapter.parameters())
        }

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Warns about the remaining adapters."""
        if self._idle and self._stepped:
            names = list(self._idle)
            warnings.warn(
                f"{len(names)} adapted layers ({', '.join(map(shown, names[:3]))}{', ...' * (len(names) > 3)}) got no "
                "gradient in any step, so that their adapters are as they began: the model does not run them, or reads "
                "their weights past their forward; leave them out by exclude_modules",
                stacklevel=2,
            )


class AlignmentDominates(TrainerCallback):
    """Warns once if the weighted alignment is far above the model's own loss in the first logs.

    These are the first in which the weight, which align_warmup lets rise, is half of its largest value or more.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._first: list[tuple[float, float]] = []  # the LM loss and the alignment of each log

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **_: Any) -> None:
        """Adds a log of training, and warns at the last one that counts."""
        aligned = find_state(self.trainer.model)
        if aligned is None or not logs.keys() >= {"lm_loss", "align_loss", "align_weight"}:
            return
        weight, pairs = aligned.config.align_weight or 0.0, aligned.config.align_pairs
        if len(self._first) == _FIRST_LOGS or not logs["align_weight"] >= weight / 2:
            return
        self._first.append((logs["lm_loss"], logs["align_loss"]))
        lm, align = (sum(values) / len(self._first) for values in zip(*self._first, strict=True))
        if len(self._first) == _FIRST_LOGS and weight * align > _FAR * lm and state.is_world_process_zero:
            cure = "a smaller align_weight" if pairs == "mean" else 'align_pairs="mean", or a smaller align_weight'
            warnings.warn(
                f"the alignment dominates what is trained: {weight:g} (align_weight) x {align:.3g} = "
                f"{weight * align:.3g}, and the loss of the model itself is {lm:.3g}, in the mean of the logs up to "
                f"step {state.global_step}: give {cure}",
                stacklevel=2,
            )


@contextmanager
def declared_adapters(model: Any) -> Iterator[None]:
    """Lets Trainer know, while it is made, that a model has adapters: it refuses a quantised one without PEFT's."""
    if not isinstance(model, nn.Module) or find_state(model) is None or getattr(model, "_hf_peft_config_loaded", False):
        yield
        return
    model._hf_peft_config_loaded = True  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._hf_peft_config_loaded


def check_trained(model: nn.Module, optimizer: Any) -> None:
    """Refuses a model if the optimizer does not train its adapters.

    Args:
        model: the Trainer's model.
        optimizer: the Trainer's optimizer; None: its parameters cannot be compared.

    Raises:
        ValueError: there are no adapters, a parameter that requires a gradient is not trained, a layer is merged, other
            adapters are trained too, or parameters cannot be saved (FullyShardedDataParallel).
    """
    unwrapped(model)
    state = find_state(model)
    if state is None:
        raise ValueError(
            "the model has no adapters, so that nothing would be aligned: call replace_linear_with_align_lora(model) "
            "first (inside model_init, where there is one), or use transformers' own Trainer"
        )
    known = {} if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
    adapted: set[Tensor] = set()
    for name, layer in adapted_layers(model).items():
        if getattr(layer, "merged", False):
            raise ValueError(f"{name} is merged, so that its adapter would not be trained: call unmerge() on the layer")
        parameters = dict(layer.adapter.named_parameters())
        adapted |= set(parameters.values())
        idle = [part for part, p in parameters.items() if not p.requires_grad or (known and id(p) not in known)]
        # Without losses on the adapters, a user may train only some of an adapter's parameters.
        if idle and (state.config.needs_step or len(idle) == len(parameters)):
            parameter = parameters[idle[0]]
            frozen = "it is frozen: call requires_grad_(True) on it before training"
            cure = _NOT_OPTIMIZED if parameter.requires_grad else frozen
            raise ValueError(f"{name}.adapter.{idle[0]} is not trained, though its layer is adapted; {cure}")
    for name, module in model.named_modules():
        if type(module).__module__.startswith("peft.tuners.") and hasattr(module, "base_layer"):
            others = ((n, p) for n, p in module.named_parameters() if not n.startswith("base_layer."))
            other = next((n for n, p in others if p.requires_grad and p not in adapted), None)
            if other is not None:
                raise ValueError(
                    f"PEFT's own adapter {name}.{other} would be trained beside the model's, which nothing aligns or "
                    "saves: leave peft_config out, or adopt a PeftModel by replace_linear_with_align_lora(model)"
                )
    for name, parameter in model.named_parameters():
        if known and parameter.requires_grad and parameter not in adapted and id(parameter) not in known:
            raise ValueError(f"{name} is not trained, though it requires a gradient; {_NOT_OPTIMIZED}, or freeze it")


def refuse_fused_head(args: Any, model: nn.Module) -> None:
    """Raises ValueError if Liger's fused linear cross entropy would read the head's weight past its adapter."""
    head, fused = embeddings_of(unwrapped(model), "output"), (args.liger_kernel_config or {}).get(_FUSED, True)
    if args.use_liger_kernel and fused and isinstance(head, AdaptedLinear):
        raise ValueError(
            f"use_liger_kernel: its {_FUSED} reads the weight of the output head past its adapter: give "
            f'liger_kernel_config={{"{_FUSED}": False}}, or leave the head out of target_modules'
        )


def refuse_peft_config(peft_config: Any) -> None:
    """Raises ValueError if a Trainer gets a peft_config, with which it would add an adapter of PEFT."""
    if peft_config is not None:
        raise ValueError(
            f"peft_config={type(peft_config).__name__} makes an adapter that nothing aligns: give its options to "
            "replace_linear_with_align_lora(model, ...), or call that on get_peft_model(model, config), and leave "
            "peft_config out"
        )


def lower_is_better(args: Any) -> None:
    """Sets greater_is_better to False if a task's loss chooses the best model; TrainingArguments would set True."""
    if args.metric_for_best_model is not None and _TASK_LOSS.search(args.metric_for_best_model):
        args.greater_is_better = False


def check_metric(trainer: Any) -> None:
    """Raises ValueError if no evaluation can give the metric that chooses the best model."""
    metric = trainer.args.metric_for_best_model
    possible = None if metric is None else _metrics(trainer)
    if possible is not None and metric.removeprefix("eval_") not in possible:
        raise ValueError(
            f"metric_for_best_model={metric!r} is no metric of the evaluation, which gives "
            f"{', '.join(f'eval_{name}' for name in sorted(possible))}"
        )


def _metrics(trainer: Any) -> set[str] | None:
    """Returns the names of an evaluation's metrics, without eval_, or None if they cannot be known."""
    overridden = [m for m in ("evaluate", "evaluation_loop") if _is_users(type(trainer), m)]
    if trainer.eval_dataset is None or trainer.compute_metrics is not None or overridden:
        return None
    datasets = trainer.eval_dataset if isinstance(trainer.eval_dataset, Mapping) else {"": trainer.eval_dataset}
    names: set[str] = set()
    for dataset_name, dataset in datasets.items():
        losses = [f"loss/{name}" for name in _task_names(dataset, trainer.task_names)]
        names |= {f"{dataset_name}_{name}" if dataset_name else name for name in (*_TRAINER_METRICS, *losses)}
    return names


def _task_names(dataset: Any, names: Sequence[str]) -> list[str]:
    """Returns the names of the tasks with examples in a dataset; all names if the dataset does not tell."""
    try:
        tasks = sorted({int(task) for task in example_tasks(dataset)} - {-1})
    except (ValueError, TypeError, KeyError):
        return list(names)
    return [names[task] if task < len(names) else str(task) for task in tasks]


def _is_users(trainer_class: type, method: str) -> bool:
    """Whether a user overrides a method: it is neither a library's nor ours."""
    module = inspect.unwrap(getattr(trainer_class, method)).__module__
    return not module.startswith(("transformers.", "trl.", "align_ext.")) and trainer_class is not Trainer
