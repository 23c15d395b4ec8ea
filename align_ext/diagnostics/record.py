"""Records what the adapters of a model do with the tokens of several tasks: latents, routing weights, gradients.

One forward a batch (and one backward of each of its tasks) serves all measures of a model that need data:

    recording = record_adapters(model, batches, gradients=True)
    latent_similarity(recording), task_divergence(recording), gradient_cosines(recording), routing(recording)
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_experts import ExpertsLora
from align_ext.adapters.capture import adapters_of, capture_latents
from align_ext.alignment.model_state import require_state

Gradients = dict[str, dict[str, Tensor]]  # layer -> parameter -> [M, *shape]


@dataclass(frozen=True)
class Recording:
    """The tokens that count, T of all batches together, on the CPU.

    Attributes:
        tasks: int64 [T], the task of each token, in 0 .. M-1.
        examples: int64 [T], the row of each token, numbered through all batches.
        latents: module name -> z [T, r], or [T, N, r] where heads have latents of their own; without experts, whose
            rows are the tokens several times.
        weights: module name -> a router's weights w [T, G, N]; empty without routers.
        gradients: module name -> parameter name -> [M, *shape], the gradient of each task's loss; empty unless asked
            for.
    """

    tasks: Tensor
    examples: Tensor
    latents: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    gradients: Mapping[str, Mapping[str, Tensor]]

    @property
    def num_tasks(self) -> int:
        """M, the largest task id plus one."""
        return int(self.tasks.max()) + 1


def record_adapters(model: nn.Module, batches: Iterable[Mapping[str, Any]], *, gradients: bool = False) -> Recording:
    """Runs the model on batches in eval mode, without dropout, and records its adapters.

    The loss of task k is that of the language model alone, without alignment or other losses on the adapters:

        L_k = -mean over the supervised tokens t of task k of log p(t | tokens before t)

    The mean is over all batches. The model is left as it was: modes, gradients, random numbers.

    Args:
        model: with adapters of any architecture, batch first, not compiled.
        batches: the model's inputs; tokens with attention_mask 0 or task_ids -1 do not count. task_ids are [B] or
            [B, S]; without them all tokens are of task 0. With gradients also labels, -100 where not supervised.
        gradients: whether to differentiate each task's loss in the adapters' trained parameters.

    Raises:
        ValueError: the model has no adapters (with gradients: none that is trained, or it returns no logits), a layer
            does not see the batch's tokens, no token counts, or labels are missing.
    """
    recorder = _Recorder(model, gradients)
    with _evaluated(model), torch.set_grad_enabled(gradients):
        for batch in batches:
            recorder.add(batch)
    return recorder.recording()


class _Recorder:
    def __init__(self, model: nn.Module, gradients: bool) -> None:
        self.model, self.gradients, self.examples = model, gradients, 0
        self.of_experts = {name for name, adapter in adapters_of(model).items() if isinstance(adapter, ExpertsLora)}
        self.trained = {
            (layer, name): parameter
            for layer, adapter in adapters_of(model).items()
            for name, parameter in adapter.named_parameters()
            if parameter.requires_grad
        }
        if gradients and not self.trained:
            raise ValueError("no adapter of the model is trained: call requires_grad_(True) on the adapters")
        state = require_state(model)
        self.needs_labels = state.config.routing == "sequence"
        self.chooses_logits = "logits_to_keep" in state.arguments and not self.needs_labels
        self.tokens: list[tuple[Tensor, Tensor]] = []  # tasks and examples
        self.latents: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.sums: dict[int, list[Tensor]] = {}  # task -> the gradients of the sum of its losses
        self.counts: dict[int, int] = {}  # task -> its supervised tokens

    def add(self, batch: Mapping[str, Any]) -> None:
        """Records a batch: task by task if gradients are wanted, all at once otherwise."""
        device = next(self.model.parameters()).device
        inputs = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()}
        if self.gradients and inputs.get("labels") is None:
            raise ValueError("a batch has no labels, which gradients are made of: add them, -100 where not supervised")
        ids = _task_of_tokens(inputs)
        examples = torch.arange(len(ids)) + self.examples
        self.examples += len(ids)
        for task in ids[ids >= 0].unique().tolist() if self.gradients else [None]:
            counts = ids >= 0 if task is None else ids == task
            rows = counts.any(1)
            if rows.any():
                chosen = {name: _rows(x, rows) for name, x in inputs.items()}
                self._run(chosen, torch.where(counts, ids, -1)[rows], examples[rows.cpu()], task)

    def _run(self, inputs: dict[str, Any], ids: Tensor, examples: Tensor, task: int | None) -> None:
        labels = inputs.get("labels")
        if not self.needs_labels:  # the model's own loss is not read
            inputs = {name: x for name, x in inputs.items() if name != "labels"}
        targets = self._targets(inputs, labels, ids) if self.gradients else None
        with capture_latents(self.model) as captured:
            output = self.model(**inputs)
        captured = {name: one for name, one in captured.items() if name not in self.of_experts}
        if not captured:
            raise ValueError("only experts are adapted, whose rows are not the batch's tokens: nothing to measure")
        tokens = len(next(iter(captured.values())).z)
        ids = ids.expand(-1, tokens // len(ids)) if ids.shape[1] == 1 else ids
        for name, (z, _) in captured.items():
            if len(z) != ids.numel():
                raise ValueError(
                    f"the layer {name} saw {len(z)} tokens of a batch of {list(ids.shape)}: measure a model whose "
                    "adapted layers all see the batch's tokens"
                )
        counts = (ids >= 0).flatten()
        self.tokens.append((ids.flatten()[counts].cpu(), examples.repeat_interleave(ids.shape[1])[counts.cpu()]))
        self.latents.append({name: z[counts].cpu() for name, (z, _) in captured.items()})
        self.weights.append({name: w[counts].cpu() for name, (_, w) in captured.items() if w is not None})
        if task is not None and targets is not None:
            self._differentiate(getattr(output, "logits", None), targets, task)

    def _targets(self, inputs: dict[str, Any], labels: Any, ids: Tensor) -> Tensor:
        """Returns the token that each logit predicts, -100 for none; asks for no other logits, if the model can."""
        targets = torch.where(ids >= 0, labels, -100)[:, 1:]
        if self.chooses_logits:
            positions = (targets != -100).any(0).nonzero().flatten()
            inputs["logits_to_keep"] = positions
            return targets[:, positions]
        return nn.functional.pad(targets, (0, 1), value=-100)

    def _differentiate(self, logits: Tensor | None, targets: Any, task: int) -> None:
        if logits is None or logits.shape[:2] != targets.shape:
            raise ValueError("the model returns no logits [B, S, V], which a language model's loss is made of")
        supervised = targets != -100
        if not supervised.any():
            return
        chosen = logits[supervised]
        chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
        loss = nn.functional.cross_entropy(chosen, targets[supervised], reduction="sum")
        parameters = list(self.trained.values())
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        whole = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
        before = self.sums.get(task)
        self.sums[task] = whole if before is None else [a + b for a, b in zip(before, whole, strict=True)]
        self.counts[task] = self.counts.get(task, 0) + int(supervised.sum())

    def recording(self) -> Recording:
        """Returns all parts as one."""
        if not self.tokens:
            raise ValueError("no token of the batches counts: they are all padding or of task -1")
        tasks, examples = (torch.cat(parts) for parts in zip(*self.tokens, strict=True))
        gradients = self._gradients(int(tasks.max()) + 1) if self.gradients else {}
        return Recording(tasks, examples, _joined(self.latents), _joined(self.weights), gradients)

    def _gradients(self, num_tasks: int) -> Gradients:
        found: Gradients = {}
        for i, ((layer, name), parameter) in enumerate(self.trained.items()):
            of_tasks = [
                self.sums[task][i] / self.counts[task] if task in self.sums else torch.zeros_like(parameter)
                for task in range(num_tasks)
            ]
            found.setdefault(layer, {})[name] = torch.stack(of_tasks).detach().cpu()
        return found


def _task_of_tokens(inputs: Mapping[str, Any]) -> Tensor:
    """Returns the task of every token, [B, S], or [B, 1] where nothing tells S; -1 where it does not count."""
    ids, mask = inputs.get("task_ids"), inputs.get("attention_mask")
    if ids is None:
        first = next(x for x in inputs.values() if isinstance(x, Tensor))
        ids = torch.zeros(len(first), dtype=torch.int64, device=first.device)
    ids = ids[:, None] if ids.dim() == 1 else ids
    return ids if mask is None else torch.where(mask != 0, ids, -1)


def _rows(value: Any, rows: Tensor) -> Any:
    return value[rows] if isinstance(value, Tensor) and value.shape[:1] == rows.shape else value


def _joined(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Puts the model into eval mode; in the end each module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
