"""The model's own loss by task, for every kind of model whose loss is a mean over tokens or samples.

| kind | one term for each | |
|---|---|---|
| causal language models | label but the first | logits of the token before |
| encoder-decoders, masked language models, token classification | label | logits of the same token |
| sequence and image classification, multiple choice | sample | one class, several, or regression |
| question answering | start, and end | the mean of both |

Whether the terms are right is not taken on trust: over a batch they must add up to the loss that the Trainer reports.
Where they do not (a loss function of one's own, auxiliary losses, weights of classes) nothing is logged by task, and a
warning says so once.
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
_PARTS = 2  # of a loss that is a mean of means: starts and ends
_NO_SHIFT, _SHIFT = ("ForMaskedLM", "ForTokenClassification"), ("ForCausalLM", "ForConditionalGeneration")


@dataclass(frozen=True)
class Terms:
    """Terms of a loss.

    Attributes:
        values: float32 [K].
        rows: int64 [K], the sample of each.
        places: int64 [K], its token, which is the predicted one; None: a term is a sample's.
    """

    values: Tensor
    rows: Tensor
    places: Tensor | None = None

    def tasks(self, ids: Tensor) -> Tensor:
        """The task of each, from ids [B] or [B, S]."""
        ids = ids.to(self.values.device)
        if ids.dim() == 1:
            return ids[self.rows]
        if self.places is None:
            raise _NotKnownError("task_ids are one per token, but the loss is one per sample")
        return ids[self.rows, self.places]


class _NotKnownError(Exception):
    """Why a batch's loss cannot be told by task."""


class TaskLosses:
    """Splits a Trainer's loss by task.

    Args:
        model: whose loss it is; may be wrapped.
        smoothing: of the labels, by the Trainer.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0) -> None:
        self.model = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
        self.smoothing = smoothing
        self.shifts = _shifts(self.model)
        self._said = False
        self.reason = "its terms do not add up to the reported loss (a loss function of one's own, auxiliary losses?)"

    def of(
        self, outputs: Any, inputs: Mapping[str, Any], ids: Tensor, loss: Tensor, items: Tensor | int | None
    ) -> tuple[Tensor, Tensor]:
        """Splits the loss of a batch.

        Args:
            outputs: of the model.
            inputs: of its forward, labels included.
            ids: [B] or [B, S]; what is of no task (-1) counts in none.
            loss: what the Trainer reports, a mean over the batch or a sum over `items`.
            items: in all micro-batches of the step; None: not known.

        Returns:
            [B, M, 2, 2]: each sample's sum and how many terms, by task, of two parts.
            By how much the terms miss the loss, 1 being the most that rounding explains.
        """
        try:
            parts = self._parts(outputs if isinstance(outputs, dict) else {}, inputs, loss, items)
            sums = torch.stack([_sums(part, ids) for part in parts], 2)
        except _NotKnownError as error:
            self.reason = str(error)
            return torch.zeros(len(ids), 1, _PARTS, 2, device=ids.device), torch.full((), torch.inf, device=ids.device)
        return nn.functional.pad(sums, (0, 0, 0, _PARTS - len(parts))), _miss(parts, loss, items, self._low(outputs))

    def print_line(self) -> None:
        """Says once why losses are not logged by task."""
        if not self._said:
            warnings.warn(f"losses are not logged by task: {self.reason}", stacklevel=3)
        self._said = True

    def _low(self, outputs: Any) -> bool:
        """Whether the loss may have been rounded to 16 bits."""
        dtypes = {x.dtype for x in outputs.values() if isinstance(x, Tensor)}
        dtypes |= {self.model.dtype} if self.model is not None else set()
        return any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in dtypes)

    def _parts(
        self, outputs: Mapping[str, Any], inputs: Mapping[str, Any], loss: Tensor, items: Tensor | int | None
    ) -> list[Terms]:
        logits, labels = outputs.get("logits"), inputs.get("labels")
        if "start_logits" in outputs and labels is None:
            return _spans(outputs, inputs)
        if not isinstance(labels, Tensor):
            raise _NotKnownError("the batch has no labels")
        log_probs = outputs.get("log_probs")
        if log_probs is not None and logits is None and labels.dim() == 2 and log_probs.shape == labels[:, 1:].shape:
            rows, places = torch.nonzero(labels[:, 1:] != IGNORED, as_tuple=True)
            return [Terms(-log_probs.detach()[rows, places].float(), rows, places + 1)]
        if not isinstance(logits, Tensor):
            raise _NotKnownError("the model's outputs hold no logits")
        logits, labels = logits.detach(), labels.to(logits.device)
        if logits.dim() == 3 and labels.shape == logits.shape[:2] and not labels.is_floating_point():
            return [self._tokens(logits, labels, loss, items)]
        if logits.dim() == 2 and len(labels) == len(logits):
            return [self._samples(logits, labels)]
        raise _NotKnownError(
            f"logits {list(logits.shape)} and labels {list(labels.shape)} are of no kind that is known"
        )

    def _tokens(self, logits: Tensor, labels: Tensor, loss: Tensor, items: Tensor | int | None) -> Terms:
        if self.shifts is None:  # a model whose class does not say: what adds up, if one of the two alone does
            misses = {shift: float(_miss([self._of_tokens(logits, labels, shift)], loss, items)) for shift in (0, 1)}
            fitting = [shift for shift, miss in misses.items() if miss <= 1]
            if len(fitting) != 1:
                raise _NotKnownError("which logits belong to which label is unknown for this model")
            self.shifts = fitting[0]
        return self._of_tokens(logits, labels, self.shifts)

    def _of_tokens(self, logits: Tensor, labels: Tensor, shift: int) -> Terms:
        """The terms of tokens; only the logits that a label asks for are made float32."""
        rows, places = torch.nonzero(labels[:, shift:] != IGNORED, as_tuple=True)
        targets = labels[rows, places + shift]
        values = cross_entropy(logits[rows, places].float(), targets, reduction="none", label_smoothing=self.smoothing)
        return Terms(values, rows, places + shift)

    def _samples(self, logits: Tensor, labels: Tensor) -> Terms:
        problem = getattr(getattr(self.model, "config", None), "problem_type", None)
        one_of = labels.dim() == 1 and not labels.is_floating_point() and logits.shape[1] > 1
        if problem in (None, "single_label_classification") and one_of:
            rows = torch.nonzero(labels != IGNORED)[:, 0]
            chosen = logits[rows].float(), labels[rows]
            return Terms(cross_entropy(*chosen, reduction="none", label_smoothing=self.smoothing), rows)
        if labels.numel() != logits.numel():
            raise _NotKnownError(f"labels {list(labels.shape)} do not fit logits {list(logits.shape)}")
        regression = problem == "regression" or (problem is None and logits.shape[1] == 1)
        measure = mse_loss if regression else binary_cross_entropy_with_logits
        values = measure(logits.float(), labels.view_as(logits).float(), reduction="none").mean(1)
        return Terms(values, torch.arange(len(logits), device=logits.device))


def _shifts(model: Any) -> int | None:
    """By how many tokens a model's labels lie ahead of its logits; None: its class does not say."""
    if model is None:
        return None
    kind = str(getattr(model, "loss_type", None) or type(model).__name__)
    if model.config.is_encoder_decoder or kind.endswith(_NO_SHIFT):
        return 0
    return 1 if kind.endswith(_SHIFT) or "LMHead" in type(model).__name__ else None


def _spans(outputs: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[Terms]:
    """Starts and ends; what lies beyond the tokens does not count."""
    parts = []
    for name in ("start", "end"):
        logits, targets = outputs[f"{name}_logits"].detach(), inputs.get(f"{name}_positions")
        if targets is None:
            raise _NotKnownError(f"the batch has no {name}_positions")
        targets = targets.reshape(-1).to(logits.device).clamp_min(0)
        rows = torch.nonzero(targets < logits.shape[1])[:, 0]
        parts.append(Terms(cross_entropy(logits[rows].float(), targets[rows], reduction="none"), rows))
    return parts


def _sums(terms: Terms, ids: Tensor) -> Tensor:
    """[B, M, 2]: each sample's sum of terms and how many, by task."""
    tasks, values = terms.tasks(ids), terms.values
    keep = tasks >= 0
    sums = torch.zeros(len(ids), number_of_tasks(ids), 2, device=values.device)
    entries = torch.stack([values, torch.ones_like(values)], dim=1)
    return sums.index_put_((terms.rows[keep], tasks[keep]), entries[keep], accumulate=True)  # deterministic on a GPU


def _miss(parts: Sequence[Terms], loss: Tensor, items: Tensor | int | None, low: bool = False) -> Tensor:
    """How far the terms are from a loss, as a mean or as a share of `items`, in units of what rounding explains."""
    values = [part.values for part in parts]
    reported = loss.detach().float()
    means = torch.stack([value.sum() / max(len(value), 1) for value in values]).mean()
    off = (means - reported).abs()
    if items is not None:
        whole = sum(value.sum() for value in values) / torch.as_tensor(items, device=reported.device) / len(values)
        # With several processes the Trainer takes its mean over them back.
        worlds = {1, torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1}
        off = torch.stack([off, *((whole * world - reported).abs() for world in worlds)]).min()
    usable = reported.isfinite() & torch.tensor(any(map(len, values)), device=reported.device)
    return torch.where(usable, off / ((2e-2 if low else 1e-4) * (reported.abs() + 1e-2)), 0.0)


class LossSums:
    """Sums of losses on the device, so that nothing waits for it before a log is due."""

    def __init__(self) -> None:
        self.steps = 0.0  # optimizer steps, of which each micro-batch is a share
        self.sums: dict[str, Tensor] = {}
        self.tasks: list[Tensor] = []  # [M, 2, 2] each, M as far as a batch has tasks
        self.misses: list[Tensor] = []

    def add(self, name: str, value: Tensor) -> None:
        """Adds one loss of one micro-batch."""
        self.sums[name] = self.sums.get(name, 0.0) + value.detach().float()

    def add_tasks(self, losses: Tensor, miss: Tensor) -> None:
        """Adds a batch's terms by task, [M, 2, 2], and by how much they miss its loss."""
        self.tasks.append(losses)
        self.misses.append(miss)

    def over_processes(self, accelerator: Any) -> LossSums:
        """The sums of all processes: what is a mean over a process's samples averaged, tasks added."""
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
        """The worst miss of every process."""
        return list(accelerator.gather(torch.stack(self.misses).max()[None])) if self.misses else []

    def means(self, names: Sequence[str], splitter: TaskLosses) -> dict[str, float]:
        """The sums per optimizer step, and `loss/<task>`, the mean of the task's terms, if the terms are right."""
        result = {name: float(value) / self.steps for name, value in self.sums.items()}
        if self.tasks and float(torch.stack(self.misses).max()) > 1:
            splitter.print_line()
        elif self.tasks:
            totals = torch.nn.utils.rnn.pad_sequence([t.double() for t in self.tasks], batch_first=True).sum(0)
            for task, parts in enumerate(totals.tolist()):
                means = [total / count for total, count in parts if count > 0]
                if means:
                    result[f"loss/{names[task] if task < len(names) else task}"] = sum(means) / len(means)
        return result
