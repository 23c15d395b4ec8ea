"""The model's loss by task, for every kind of model whose loss is a mean over tokens or samples.

| kind of model | one term per | logits |
|---|---|---|
| causal language models | label but the first | logits of the token before |
| encoder-decoders, masked language models, token classification | label | logits of the same token |
| sequence and image classification, multiple choice | sample | one class, several, or regression |
| question answering | start, and end | the mean of both |

The terms are verified: over a batch they must add up to the loss that the Trainer reports. If they do not (custom loss
functions, auxiliary losses, class weights), no losses are logged by task, and one warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss
from transformers import PreTrainedModel

from align_ext.alignment.tokens import number_of_tasks

IGNORED = -100
_PARTS = 2  # the most means of which a loss may be the mean: those of starts and of ends
_NO_SHIFT, _SHIFT = ("ForMaskedLM", "ForTokenClassification"), ("ForCausalLM", "ForConditionalGeneration")


@dataclass(frozen=True)
class Terms:
    """The terms of a loss.

    Attributes:
        values: float32 [K], the terms.
        rows: int64 [K], the sample of each term.
        tokens: int64 [K], the predicted token of each term; None: each term belongs to a whole sample.
    """

    values: Tensor
    rows: Tensor
    tokens: Tensor | None = None

    def tasks(self, ids: Tensor) -> Tensor:
        """Returns the task of each term, from ids [B] or [B, S]."""
        ids = ids.to(self.values.device)
        if ids.dim() == 1:
            return ids[self.rows]
        if self.tokens is None:
            raise _NotSplittableError("task_ids are one per token, but the loss is one per sample")
        return ids[self.rows, self.tokens]


class _NotSplittableError(Exception):
    """Says why a batch's loss cannot be split by task."""


class TaskLosses:
    """Splits a Trainer's loss by task.

    Args:
        model: the model, which may be wrapped.
        smoothing: the label smoothing of the Trainer.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        self.model = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        self.smoothing = smoothing
        self.shifts = _shifts(self.model)
        self._warned = False
        self.reason = "its terms do not add up to the reported loss (a loss function of one's own, auxiliary losses?)"

    def of(
        self, outputs: Any, inputs: Mapping[str, Any], ids: Tensor, loss: Tensor, items: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """Splits the loss of a batch.

        Args:
            outputs: the outputs of the model.
            inputs: the inputs of its forward, with labels.
            ids: [B] or [B, S], the tasks; -1 counts in no task.
            loss: the loss that the Trainer reports, a mean over the batch or a sum over `items`.
            items: the number of items in all micro-batches of the step; None: not known.

        Returns:
            [B, 1 + M, 2, 2]: for each sample, task (the first one: none) and part, the sum and the number of terms.
            The difference between the terms and the loss; rounding explains at most 1.
        """
        try:
            parts = self._split_terms(outputs if isinstance(outputs, dict) else {}, inputs, loss, items)
            sums = torch.stack([_sums_by_task(part, ids) for part in parts], 2)
        except _NotSplittableError as error:
            self.reason = str(error)
            return torch.zeros(len(ids), 1, _PARTS, 2, device=ids.device), torch.full((), torch.inf, device=ids.device)
        sums = nn.functional.pad(sums, (0, 0, 0, _PARTS - len(parts)))
        return sums, _miss(parts, loss, items, self._rounded(outputs))

    def print_line(self) -> None:
        """Warns once that losses are not logged by task, with the reason."""
        if not self._warned:
            warnings.warn(f"losses are not logged by task: {self.reason}", stacklevel=3)
        self._warned = True

    def _rounded(self, outputs: Any) -> bool:
        """Whether the loss may have been rounded to 16 bits."""
        dtypes = {x.dtype for x in outputs.values() if isinstance(x, Tensor)}
        dtypes |= {self.model.dtype} if self.model is not None else set()
        return any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in dtypes)

    def _split_terms(
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], loss: Tensor, items: Tensor | int | None
    ) -> list[Terms]:
        logits, labels = outputs.get("logits"), inputs.get("labels")
        if "start_logits" in outputs and labels is None:
            return _span_terms(outputs, inputs)
        if not isinstance(labels, Tensor):
            raise _NotSplittableError("the batch has no labels")
        log_probs = outputs.get("log_probs")
        if log_probs is not None and logits is None and labels.dim() == 2 and log_probs.shape == labels[:, 1:].shape:
            rows, tokens = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
            return [Terms(-log_probs.detach()[rows, tokens].float(), rows, tokens + 1)]
        if not isinstance(logits, Tensor):
            raise _NotSplittableError("the model's outputs hold no logits")
        logits, labels = logits.detach(), labels.to(logits.device)
        if logits.dim() == 3 and labels.shape == logits.shape[:2] and not labels.is_floating_point():
            return [self._fitting_token_terms(logits, labels, loss, items)]
        if logits.dim() == 2 and len(labels) == len(logits):
            return [self._sample_terms(logits, labels)]
        raise _NotSplittableError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} are of no kind that is known"
        )

    def _fitting_token_terms(self, logits: Tensor, labels: Tensor, loss: Tensor, items: Tensor | int | None) -> Terms:
        if self.shifts is None:  # not known by the model's class: take the shift that adds up, if only one does
            misses = {shift: float(_miss([self._token_terms(logits, labels, shift)], loss, items)) for shift in (0, 1)}
            fitting = [shift for shift, miss in misses.items() if miss <= 1]
            if len(fitting) != 1:
                raise _NotSplittableError("which logits belong to which label is unknown for this model")
            self.shifts = fitting[0]
        return self._token_terms(logits, labels, self.shifts)

    def _token_terms(self, logits: Tensor, labels: Tensor, shift: int) -> Terms:
        """Returns the terms of tokens; only logits with a label are converted to float32."""
        rows, tokens = torch.nonzero(labels[:, shift:] != IGNORED, as_tuple=True)
        targets = labels[rows, tokens + shift]
        values = cross_entropy(logits[rows, tokens].float(), targets, reduction="none", label_smoothing=self.smoothing)
        return Terms(values, rows, tokens + shift)

    def _sample_terms(self, logits: Tensor, labels: Tensor) -> Terms:
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        single_label = labels.dim() == 1 and not labels.is_floating_point() and logits.shape[1] > 1
        if problem in (None, "single_label_classification") and single_label:
            rows = torch.nonzero(labels != IGNORED)[:, 0]
            chosen = logits[rows].float(), labels[rows]
            return Terms(cross_entropy(*chosen, reduction="none", label_smoothing=self.smoothing), rows)
        if labels.numel() != logits.numel():
            raise _NotSplittableError(f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}")
        regression = problem == "regression" or (problem is None and logits.shape[1] == 1)
        measure = mse_loss if regression else binary_cross_entropy_with_logits
        values = measure(logits.float(), labels.view_as(logits).float(), reduction="none").mean(1)
        return Terms(values, torch.arange(len(logits), device=logits.device))


def _shifts(model: Any) -> int | None:
    """Returns by how many tokens a model's labels are ahead of its logits; None: its class does not tell."""
    if model is None:
        return None
    name = str(getattr(model, "loss_type", None) or type(model).__name__)
    if model.config.is_encoder_decoder or name.endswith(_NO_SHIFT):
        return 0
    return 1 if name.endswith(_SHIFT) or "LMHead" in type(model).__name__ else None


def _span_terms(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Terms]:
    """Returns the terms of starts and of ends; positions beyond the tokens do not count."""
    parts = []
    for name in ("start", "end"):
        logits, targets = outputs[f"{name}_logits"].detach(), inputs.get(f"{name}_positions")
        if targets is None:
            raise _NotSplittableError(f"the batch has no {name}_positions")
        targets = targets.reshape(-1).to(logits.device).clamp_min(0)
        rows = torch.nonzero(targets < logits.shape[1])[:, 0]
        parts.append(Terms(cross_entropy(logits[rows].float(), targets[rows], reduction="none"), rows))
    return parts


def _sums_by_task(terms: Terms, ids: Tensor) -> Tensor:
    """Returns [B, 1 + M, 2]: for each sample and task, the first one none, the sum and the number of terms."""
    tasks, values = terms.tasks(ids) + 1, terms.values
    sums = torch.zeros(len(ids), 1 + number_of_tasks(ids), 2, device=values.device)
    entries = torch.stack([values, torch.ones_like(values)], dim=1)
    return sums.index_put_((terms.rows, tasks), entries, accumulate=True)  # deterministic on GPUs


def _miss(parts: Sequence[Terms], loss: Tensor, items: Tensor | int | None, low_precision: bool = False) -> Tensor:
    """Returns the difference between the terms and a loss, a mean or a sum over `items`; rounding explains up to 1."""
    values = [part.values for part in parts]
    reported = loss.detach().float()
    means = torch.stack([value.sum() / max(len(value), 1) for value in values]).mean()
    difference = (means - reported).abs()
    if items is not None:
        total = sum(value.sum() for value in values) / torch.as_tensor(items, device=reported.device) / len(values)
        # With several processes, the Trainer multiplies the loss by their number to undo the mean over them.
        worlds = {1, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1}
        difference = torch.stack([difference, *((total * world - reported).abs() for world in worlds)]).min()
    usable = reported.isfinite() & torch.tensor(any(map(len, values)), device=reported.device)
    return torch.where(usable, difference / ((2e-2 if low_precision else 1e-4) * (reported.abs() + 1e-2)), 0.0)


class LossSums:
    """Sums losses on the device, so that the host waits for it only when a log is due."""

    def __init__(self) -> None:
        self.steps = 0.0  # optimizer steps; each micro-batch adds a fraction
        self.sums: dict[str, Tensor] = {}
        self.tasks: list[Tensor] = []  # [1 + M, 2, 2] each, M the number of tasks in a batch
        self.misses: list[Tensor] = []

    def add(self, name: str, value: Tensor) -> None:
        """Adds one loss of one micro-batch."""
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def add_tasks(self, losses: Tensor, miss: Tensor) -> None:
        """Adds a batch's terms by task, [1 + M, 2, 2], and their difference to its loss."""
        self.tasks.append(losses)
        self.misses.append(miss)

    def over_processes(self, accelerator: Any) -> LossSums:
        """Returns the sums of all processes: means over a process's samples are averaged, sums by task are added."""
        result = LossSums()
        result.steps = self.steps
        result.sums = {name: accelerator.reduce(value, "mean") for name, value in self.sums.items()}
        if self.tasks:
            tasks = torch.nn.utils.rnn.pad_sequence(self.tasks, batch_first=True).sum(0)
            tasks = accelerator.pad_across_processes(tasks)
            result.tasks = list(accelerator.gather(tasks[None]))
        result.misses = self.all_misses(accelerator)
        return result

    def all_misses(self, accelerator: Any) -> list[Tensor]:
        """Returns the largest difference of every process."""
        return list(accelerator.gather(torch.stack(self.misses).max()[None])) if self.misses else []

    def means(self, names: Sequence[str], splitter: TaskLosses) -> dict[str, float]:
        """Returns the sums per optimizer step, and `loss/<task>`, the mean of a task's terms, if the terms add up."""
        result = {name: float(value) / self.steps for name, value in self.sums.items()}
        if self.tasks and not self._add_up():
            splitter.print_line()
        elif self.tasks:
            for task, parts in enumerate(self._totals()[1:]):
                if (mean := _mean(parts)) is not None:
                    result[f"loss/{names[task] if task < len(names) else task}"] = mean
        return result

    def mean(self) -> float | None:
        """Returns the mean of all terms; None if there are none, or they do not add up."""
        return _mean(self._totals().sum(0)) if self.tasks and self._add_up() else None

    def _add_up(self) -> bool:
        return float(torch.stack(self.misses).max()) <= 1

    def _totals(self) -> Tensor:
        return torch.nn.utils.rnn.pad_sequence([t.double() for t in self.tasks], batch_first=True).sum(0)


def _mean(parts: Tensor) -> float | None:
    """Returns the mean of the means of parts [2, 2], sums and numbers of terms; None if there are no terms."""
    means = [total / count for total, count in parts.tolist() if count > 0]
    return sum(means) / len(means) if means else None
