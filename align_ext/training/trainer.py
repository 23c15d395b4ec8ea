"""transformers' Trainer with task ids: adds the alignment loss at its exact weight, and logs losses by task."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.data import Sampler, SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, has_length

from align_ext.alignment.accumulation import align_statistics
from align_ext.alignment.context import align_step, named_tasks
from align_ext.alignment.guards import refuse_processes_apart
from align_ext.alignment.micro_batch import MicroBatchShare
from align_ext.alignment.model_state import find_state
from align_ext.alignment.step import AlignStep
from align_ext.base_model.sharded import shard_ranks
from align_ext.config import AlignLoraConfig
from align_ext.data.join_tasks import add_task_ids, example_tasks, join_tasks
from align_ext.data.task_sampler import Mixing, TaskSampler
from align_ext.io.adapter_folder import checked_task_names
from align_ext.system.bounds import unknown_name
from align_ext.system.messages import shown
from align_ext.training.allocates_ranks import AllocatesRanks
from align_ext.training.checkpoint import load_queue, load_trained, save_trained
from align_ext.training.checks import (
    AlignmentDominates,
    ChecksBeforeTraining,
    LayersThatNeverRan,
    declared_adapters,
    lower_is_better,
    refuse_peft_config,
)
from align_ext.training.safe_saving import SafeMixin
from align_ext.training.schedule import AlignSchedule, schedule_factor
from align_ext.training.task_losses import LossSums, TaskLosses

_NO_IDS = (
    "alignment is on, but a training batch has no task_ids: give the training dataset an integer column task_ids "
    "(join_tasks makes one of a dataset for each task); AlignTrainer needs TaskCollator to collate it, AlignSFTTrainer "
    "does that by itself, other trainers of TRL drop the column"
)


class AlignMixin(SafeMixin):
    """Adds alignment to a Trainer, before which it stands in a class's bases, as in AlignTrainer and AlignSFTTrainer.

    The loss is Trainer's loss plus weight * alignment; with gradient accumulation, each micro-batch has the same weight
    in the alignment. The model's align_accumulation decides what is aligned together; with "exact", each step begins
    with a forward of all its micro-batches for their statistics. Besides `loss` it logs `lm_loss` and, if they are on,
    `align_loss`, `balance_loss`, `spectral_loss` and `orth_loss`, as means without weights over the steps since the
    last log, and `loss/<task>` from the batches of the logging steps (not with logging_strategy="epoch"). Evaluation
    logs `eval_loss/<task>`; metric_for_best_model takes the lowest. The loss of a task is the model's loss over the
    task's tokens or samples (training/task_losses.py). task_ids are optional if the model does not need them (plain
    LoRA). Of adalora it allocates the ranks after each optimizer step (model/rank_allocation.py).

    Args:
        *args: as in Trainer.
        task_names: the names of tasks 0, 1, ..., for the log and the checkpoints; a task without a name has its id.
        in_order: whether to take the training examples in the dataset's order instead of shuffling.
        train_dataset: as in Trainer; or a dictionary of datasets by task name, joined by join_tasks. An eval_dataset
            with the same names then needs no task_ids either.
        mixing: mix the tasks of the training examples (column task_ids) by a TaskSampler: "proportional",
            "temperature", "equal" or "round_robin", or a dictionary of its options that includes "mixing".
        align_schedule: "constant", "linear" or "cosine" (both to 0); the weight is logged as `align_weight`.
        align_warmup: the fraction of the steps in which the weight first rises from 0.
        **kwargs: as in Trainer.

    A checkpoint is a folder of save_adapter with everything that is trained, without the frozen model (FSDP and
    DeepSpeed add their own files); train(resume_from_checkpoint=...) continues bit for bit.

    Raises:
        ValueError: an option is out of range; there is a peft_config; nn.DataParallel or unconnected processes would be
            used with alignment; when training begins, the model has no adapters, they are not trained, or no evaluation
            gives the chosen metric; in training, a batch has no task_ids.
    """

    def __init__(
        self, *args: Any, task_names: Sequence[str] = (), in_order: bool = False,
        mixing: Mixing | Mapping[str, Any] | None = None, align_schedule: AlignSchedule = "constant",
        align_warmup: float = 0.0, **kwargs: Any,
    ) -> None:  # fmt: skip
        if not isinstance(in_order, bool):
            raise ValueError(f"in_order must be True or False, got {shown(in_order)}")
        if align_schedule not in get_args(AlignSchedule):
            raise ValueError(unknown_name("align_schedule", str(align_schedule), get_args(AlignSchedule)))
        if not 0 <= align_warmup < 1:
            raise ValueError(f"align_warmup must be a share of the steps, 0 <= share < 1, got {align_warmup}")
        self.align_schedule, self.align_warmup = align_schedule, align_warmup
        self._last_weight: float | None = None
        refuse_peft_config(kwargs.get("peft_config"))
        if isinstance(kwargs.get("train_dataset"), Mapping):
            kwargs["train_dataset"], names = join_tasks(kwargs["train_dataset"])
            task_names = task_names or names
            kwargs["eval_dataset"] = add_task_ids(kwargs.get("eval_dataset"), names)
        with declared_adapters(kwargs.get("model", args[0] if args else None)):
            super().__init__(*args, **kwargs)
        cure = "on CPUs give the arguments use_cpu=True, so that they join by gloo"
        refuse_processes_apart(
            self.args.world_size, cure
        )  # a process group of others' does not make Trainer's steps one
        lower_is_better(self.args)
        config = self._config() or AlignLoraConfig()
        self.task_names, self.in_order = checked_task_names(task_names, config), in_order
        self.mixing = {"mixing": mixing} if isinstance(mixing, str) else mixing
        self._train_sums, self._eval_sums = LossSums(), LossSums()
        self._splitter: TaskLosses | None = None
        self._batches: list[Any] = []  # the micro-batches of the current step, until their first pass
        self._parts: list[MicroBatchShare] = []  # the shares of the step's remaining micro-batches
        self._epochs = _NextEpoch()
        self.add_callback(self._epochs)
        self.add_callback(ChecksBeforeTraining(self))
        self.add_callback(LayersThatNeverRan(self))
        self.add_callback(AlignmentDominates(self))
        self.add_callback(AllocatesRanks(self))
        if self.mixing is not None and not has_length(self.train_dataset):
            raise ValueError("mixing needs a dataset of known size: join_tasks mixes iterable ones, leave mixing out")
        if self._aligned() and self.args.n_gpu > 1:
            raise ValueError("alignment needs one process per GPU: start the script with torchrun or accelerate launch")

    def _aligned(self) -> bool:
        config = self._config()
        return config is not None and config.needs_step

    def _config(self) -> AlignLoraConfig | None:
        state = find_state(self.model)
        return None if state is None else state.config

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "task_ids" not in self._signature_columns:
            self._signature_columns.append("task_ids")

    def _get_train_sampler(self, *args: Any) -> Sampler | None:
        if self.mixing is not None:
            return self._task_sampler(args[0] if args else self.train_dataset)
        return SequentialSampler(self.train_dataset) if self.in_order else super()._get_train_sampler(*args)

    def _task_sampler(self, dataset: Any) -> TaskSampler:
        size = self.args.train_batch_size * (self.args.world_size if self.args.accelerator_config.split_batches else 1)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        options = {"seed": seed, "batch_size": size, **(self.mixing or {})}
        tasks = options.pop("tasks", None)
        sampler = TaskSampler(example_tasks(dataset) if tasks is None else tasks, **options)
        self._epochs.sampler = sampler
        return sampler

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Computes Trainer's loss plus, in training, the weighted alignment of the batch's tasks."""
        inputs = dict(inputs)
        ids = inputs.pop("task_ids", None)
        original_inputs, mask = dict(inputs), inputs.get("attention_mask")
        aligned, config = model.training and self._aligned(), self._config()
        if aligned and ids is None and config is not None and config.needs_ids:
            raise ValueError(_NO_IDS)
        if not model.training and torch.is_grad_enabled() and self._aligned():
            raise ValueError("the model is in eval mode in training, where nothing is aligned: call model.train()")
        if ids is not None and not model.training and config is not None and config.row.by_task:
            inputs["task_ids"] = ids  # each sample uses the adapter of its task
        part = self._next_part(model) if aligned else None
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None  # only the forward knows other kinds
        step_or_not = align_step(model, ids, mask, inputs.get("labels")) if aligned else contextlib.nullcontext()
        with step_or_not as step:
            by_task = ids is not None and (not model.training or self._is_logging_step())
            loss, outputs, predicted = self._loss_and_outputs(
                model, inputs, num_items_in_batch, return_outputs=return_outputs, by_task=by_task
            )
        if by_task:
            self._add_tasks(predicted, original_inputs, ids, loss, num_items_in_batch, training=model.training)
        total = self._record(step, part, loss, num_items_in_batch) if model.training else loss
        return (total, outputs) if return_outputs else total

    def _add_tasks(
        self, outputs: Any, inputs: Mapping[str, Any], ids: Tensor, loss: Tensor, items: Any, *, training: bool
    ) -> None:
        """Adds a batch's loss to the sums by task."""
        losses, miss = self._by_task.of(outputs, inputs, ids, loss, items)
        if training:
            self._train_sums.add_tasks(losses.sum(0), miss)
        else:
            flattened = ids.dim() == 2 and len(ids) == 1
            self._eval_sums.add_tasks(self._gather_samples(losses, flattened=flattened), miss)

    @property
    def _by_task(self) -> TaskLosses:
        if self._splitter is None:
            smoothing = self.args.label_smoothing_factor if self.label_smoother is not None else 0.0
            self._splitter = TaskLosses(self.model, smoothing)
        return self._splitter

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        """Runs Trainer's method; if it generates (Seq2SeqTrainer), each sample uses the adapter of its task."""
        if not getattr(self.args, "predict_with_generate", False) or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)
        inputs = self._prepare_inputs(inputs)
        ids, seen = inputs.get("task_ids"), []
        rest = {name: value for name, value in inputs.items() if name != "task_ids"}
        config = self._config()
        named = named_tasks(self.model, ids) if config is not None and ids is not None else contextlib.nullcontext()
        handle = model.register_forward_hook(lambda module, original_inputs, output: seen.append(output))
        try:
            with named:
                result = super().prediction_step(model, rest, prediction_loss_only, *args, **kwargs)
        finally:
            handle.remove()
        if ids is not None and result[0] is not None:  # the last forward gave the loss
            self._add_tasks(seen[-1], rest, ids, result[0], None, training=False)
        return result

    def _loss_and_outputs(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any, *, return_outputs: bool, by_task: bool
    ) -> tuple[Tensor, Any, Any]:
        """Returns Trainer's loss, its outputs (with return_outputs), and outputs to split the loss (with by_task)."""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, num_items_in_batch=num_items_in_batch)
        return loss, outputs, outputs

    def _gather_samples(self, losses: Tensor, *, flattened: bool) -> Tensor:
        """Sums losses [B, M, 2, 2] over all processes' samples, without those that only fill the last batch."""
        losses = self.accelerator.pad_across_processes(losses, dim=1)
        # A padding-free batch is one row for any number of samples, so accelerate cannot know which ones it added.
        gather = self.accelerator.gather if flattened else self.accelerator.gather_for_metrics
        return gather(losses).sum(0)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Runs Trainer's method and stores the micro-batches of the step for align_accumulation="exact"."""
        batches, num_items_in_batch = super().get_batch_samples(*args, **kwargs)
        self._batches, self._parts = batches, []
        return batches, num_items_in_batch

    def _next_part(self, model: nn.Module) -> MicroBatchShare | None:
        """Returns the next micro-batch's share of its step for "exact", and restores its random state for dropout.

        The first pass is not in get_batch_samples, since a resumed run restores its generators after that.
        """
        config = self._config()
        if config is None or config.align is None or config.align_accumulation != "exact":
            return None
        if not self._parts and self._batches:
            self._parts = align_statistics(model, [self._prepare_inputs(batch) for batch in self._batches]).parts
            self._batches = []
        if not self._parts:
            return None  # not in a step of Trainer: step.total raises the error
        part = self._parts.pop(0)
        part.restore_rng()
        return part

    def _record(
        self,
        step: AlignStep | None,
        part: MicroBatchShare | None,
        loss: Tensor,
        num_items_in_batch: Tensor | int | None,
    ) -> Tensor:
        """Adds the alignment to a micro-batch's loss; each micro-batch gets the weight 1 / accumulation steps."""
        weight_in_step = 1 / getattr(self, "current_gradient_accumulation_steps", 1)
        # A loss divided by the tokens of all micro-batches is already scaled: Trainer will not divide the total.
        scaled = self._is_scaled(num_items_in_batch)
        self._train_sums.steps += weight_in_step
        self._train_sums.add("lm_loss", loss if scaled else loss * weight_in_step)
        config = self._config()
        if step is None:
            return loss
        self._last_weight = self._align_weight()
        total = step.total(loss, weight=self._last_weight, scale=weight_in_step if scaled else 1.0, of=part)
        if step.alignment is not None and config is not None:
            self._train_sums.add("aligned_pairs", step.alignment.statistics.pairs(config) * weight_in_step)
        values = {"align_loss": step.alignment, "balance_loss": step.balance}
        losses = {name: part.value for name, part in values.items() if part is not None}
        of_parameters = {"spectral_loss": step.spectral, "orth_loss": step.orthogonality}
        losses |= {name: value for name, value in of_parameters.items() if value is not None}
        for name, value in losses.items():
            self._train_sums.add(name, value * weight_in_step)
        return total

    def _align_weight(self) -> float | None:
        """Returns the scheduled weight of the current step; None without alignment."""
        config, state = self._config(), self.state
        if config is None or config.align_weight is None:
            return None
        schedule = self.align_schedule, self.align_warmup
        return config.align_weight * schedule_factor(*schedule, state.global_step, state.max_steps)

    def _is_scaled(self, num_items_in_batch: Tensor | int | None) -> bool:
        """Whether Trainer (in training_step) does not divide the loss by the accumulation steps."""
        override = getattr(self, "loss_is_scaled_for_ga", None)
        if override is not None:
            return bool(override)
        by_tokens = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        return by_tokens or self.compute_loss_func is not None

    def _is_logging_step(self) -> bool:
        if self.args.logging_strategy != IntervalStrategy.STEPS:
            return False
        step = self.state.global_step + 1
        return step % self.state.logging_steps == 0 or (step == 1 and self.args.logging_first_step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the terms of the loss to a training log."""
        if "loss" in logs:
            logs.update(self._train_sums.over_processes(self.accelerator).means(self.task_names, self._by_task))
            if "align_loss" in logs and self._last_weight is not None:
                logs["align_weight"] = self._last_weight
            self._train_sums = LossSums()
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Runs Trainer's loop and adds `<prefix>_loss/<task>`, the mean loss per token or sample, to its metrics.

        With these `<prefix>_loss` is the mean of all of them, whatever the batches and processes: Trainer's own is a
        mean of batches by their rows, which have unequal numbers of tokens. The training draws the same random numbers
        whether it is evaluated or not: a loader of batches draws a seed.
        """
        self._eval_sums = LossSums()
        with torch.random.fork_rng(devices=[]):
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        self._eval_sums.misses = self._eval_sums.all_misses(self.accelerator)
        means = self._eval_sums.means(self.task_names, self._by_task)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})
        if (loss := self._eval_sums.mean()) is not None:
            output.metrics[f"{metric_key_prefix}_loss"] = loss
        return output

    def _is_sharded(self) -> bool:
        """Whether processes may hold shards of the parameters, so that all of them must save."""
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _is_loaded_by_others(self) -> bool:
        """Whether Trainer loads the model: without adapters, or if DeepSpeed's optimizer has copies of parameters."""
        return self._config() is None or self.is_deepspeed_enabled

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes the adapter's folder, in all processes if the parameters are sharded."""
        if self._config() is None or not self._is_sharded():
            super().save_model(output_dir, _internal_call)
            return
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        if self._config() is None:
            super()._save(output_dir, state_dict)
            return
        folder = output_dir or self.args.output_dir
        if self.args.should_save or shard_ranks(self.model.parameters()):
            save_trained(self.model, folder, self.task_names)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_loaded_by_others():
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            load_trained(self.model if model is None else model, resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self.is_deepspeed_enabled and self._config() is not None:
            load_queue(self.model, checkpoint)  # DeepSpeed loads everything else from its own files

    def _load_best_model(self) -> None:
        if self._is_loaded_by_others():
            super()._load_best_model()
        else:
            load_trained(self.model, self.state.best_model_checkpoint)


class AlignTrainer(AlignMixin, Trainer):
    """Trains a model adapted by replace_linear_with_align_lora on batches with `task_ids`: transformers' Trainer."""


class _NextEpoch(TrainerCallback):
    """Sets the sampler's epoch, which accelerate does not do when it skips the batches before a checkpoint."""

    sampler: TaskSampler | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Sets the epoch that begins or is resumed."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch))
