"""One training step's losses on the adapters: task ids in, the layers' latents, one loss node, their gradients out.

    with align_step(model, task_ids, attention_mask) as step:      # forward: layers hand over their latent z
        lm = model(**batch).loss
    step.total(lm).backward()                                      # lm + weight * align (+ ...), one autograd node

or, the same behind forward hooks (forward_hooks.py):  model(**batch, task_ids=task_ids).loss.backward().

In backward the loss node runs first, since the model's own loss hangs below it, and has the step prepare the gradient
in every latent, times what came in. The node behind each layer, which knows the step by a number, hands the layer's
share on as dz (tap.py). So the gradient is exact whatever the training loop does: activation checkpointing of either
kind, accumulation, loss scaling, pending forwards, compilation, data parallelism.
A router's weights w go the same way as the latents; the spectral loss depends on parameters alone and is ordinary
autograd.
The latents are the layers' own tensors, not copies (a compiled graph's are). The step holds them until total, then the
loss node does, as what it saved for backward: they go when autograd frees the loss's graph.
docs/numerics.md derives the tables; docs/architecture.md follows one batch through these files.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from align_ext.alignment.guards import refuse_compiled_autograd, world_size
from align_ext.alignment.loss_report import LossReport
from align_ext.alignment.model_state import STATISTICS, AlignState, MicroBatchShare, Statistics
from align_ext.alignment.tap import LATENT, WEIGHTS, as_key, register_step, tap
from align_ext.alignment.tokens import StepTokens
from align_ext.losses.balance import Balance
from align_ext.losses.kl import KlAlignment
from align_ext.losses.mmd import MmdAlignment
from align_ext.losses.tokens import Latents
from align_ext.ops._autograd import apply_of

_NOT_DIFFERENTIATED = (
    "backward reached an aligned layer, but not the alignment loss: differentiate step.total(loss), or the loss of "
    "model(..., task_ids=ids); align_step(..., strict=False) allows it, and the layer then gets no alignment gradient"
)


class AlignStep(StepTokens):
    """One forward's task ids, the layers' latents and, inside backward, the gradients of these.

    Args:
        state: of the model.
        ids: [B] or [B, S]; None: all tokens are of one task (where no loss tells tasks apart).
        like: a tensor on the device of the ids.
        strict: a backward that meets the layers without the loss is an error.
        by_keyword: opened by the model's own forward.
        records: layers hand over their outputs; False for evaluation.
    """

    door = torch.zeros((), dtype=torch.int64, device="cpu")  # of record_ (align_ext/alignment/tap.py), for all steps

    def __init__(
        self, state: AlignState, ids: Tensor | None, like: Tensor, *, strict: bool = True, by_keyword: bool = False,
        records: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(state, ids, like, records=records)
        self.strict, self.by_keyword = strict, by_keyword
        self.number = register_step(self)
        self.key = as_key(self.number)
        self.seen: set[int] = set()
        self.alignment: KlAlignment | MmdAlignment | None = None
        self.balance: Balance | None = None
        self.spectral: Tensor | None = None
        self._has_total = False
        self._recorded: dict[int, Latents] = {LATENT: {}, WEIGHTS: {}}  # of the layers that ran, until total
        self._gradients: dict[int, Latents] | None = None  # what no layer has taken yet, inside backward
        self._differentiated = False
        self._own: Statistics | None = None  # for the queue, once the loss is differentiated
        self._lm: Tensor | None = None
        self._weight = 0.0

    def tap(self, adapter: Any, x: Tensor, y: Tensor, z: Tensor, w: Tensor | None) -> Tensor:
        """Records the outputs of a layer that ran on x, and returns y with the step's gradients behind it."""
        config = self.state.config
        if config.align:
            self._hand_over(adapter, z.detach(), LATENT)
        w = w if config.balance else None
        if w is not None:
            self._hand_over(adapter, w.detach(), WEIGHTS)
        self.check_layout(x.shape)
        return tap(y, z, w, self, adapter)

    def _hand_over(self, adapter: Any, output_of_layer: Tensor, output: int) -> None:
        if torch.compiler.is_compiling():
            torch.ops.align_ext.record_(self.door, output_of_layer, self.key, adapter.layer_key, output)
        else:
            self.record(adapter.layer, output_of_layer, output)

    def record(self, layer: int, z: Tensor, output: int = LATENT) -> None:
        """Records an output of a layer that ran; a second time is an error."""
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing recomputes the layer inside backward: its z is here already
        if layer in self._recorded[output] or self._has_total:
            raise RuntimeError(
                f"the aligned layer {self.state.names[layer]!r} ran twice in one step: use one align_step (or one "
                "task_ids= call) per forward; a layer that the model runs several times in a forward (ALBERT's) cannot "
                "be aligned: leave it out by exclude_modules, or adapt the model with align=None"
            )
        self.check_tokens(layer, z.shape[0])
        self.seen.add(layer)
        self._recorded[output][layer] = z

    def statistics(self) -> Statistics:
        """What the alignment needs of this process's tokens; before total."""
        state = self.state
        sizes = len(state.names), state.tasks, state.rank
        return STATISTICS[state.config.align or "kl"].of(
            self._recorded[LATENT], self.aligned_tokens, sizes, state.config
        )

    def pop_gradient(self, layer: int, output: int = LATENT) -> Tensor | None:
        """The gradient in a layer's output, the caller's own from now on; None outside the loss's backward."""
        if self._gradients is None:
            if self.strict and not self._differentiated:
                raise RuntimeError(_NOT_DIFFERENTIATED)
            return None
        if output not in self._gradients:
            return None
        if layer not in self._gradients[output]:
            raise RuntimeError(f"one backward reached the aligned layer {self.state.names[layer]!r} twice")
        return self._gradients[output].pop(layer)

    def prepare_gradients(self, d_total: Tensor, factors: dict[int, float], recorded: dict[int, Latents]) -> None:
        """Computes the gradients in all outputs, for the layers to take until the running backward ends."""
        refuse_compiled_autograd(ahead=False)
        losses = {LATENT: (self.alignment, self.aligned_tokens), WEIGHTS: (self.balance, self.counting)}
        self._gradients = {
            output: loss.gradients(recorded[output], tokens, d_total, factors[output])
            for output, (loss, tokens) in losses.items()
            if loss is not None
        }
        self._differentiated = True
        self.state.in_backward.append(self)
        torch.autograd.Variable._execution_engine.queue_callback(self._finish_backward)

    def _finish_backward(self) -> None:
        layers = {layer for of_output in (self._gradients or {}).values() for layer in of_output}
        if layers and self.strict:
            warnings.warn(
                f"the alignment did not reach {len(layers)} layers, the first is {self.state.names[min(layers)]!r}: "
                "the loss does not depend on them, or their adapters are frozen; leave them out by exclude_modules",
                stacklevel=1,
            )
        self._gradients = None
        self._enqueue()
        self.state.in_backward[:] = [step for step in self.state.in_backward if step is not self]

    def _enqueue(self) -> None:
        """Leaves the statistics of a step that went well to the next ones; of others nothing remains."""
        own, self._own = self._own, None
        if own is not None and self._lm is not None:
            values = [self._lm, *(tensor for tensor in own.to_tensors().values() if tensor.is_floating_point())]
            if all(bool(torch.isfinite(value).all()) for value in values):
                self.state.queue.append(own)

    @torch.compiler.disable
    def total(
        self, loss: Tensor, weight: float | None = None, scale: float = 1.0, of: MicroBatchShare | None = None
    ) -> Tensor:
        """Computes loss + scale * (weight * align + balance_weight * balance + spectral_weight * spectral).

        Args:
            loss: scalar, the model's loss of this step's forward.
            weight: lambda; None takes config.align_weight.
            scale: a further factor on what is added (1 / accumulation steps where the loss is divided already).
            of: this forward's part of several that are aligned as one batch (align_statistics).

        Raises:
            RuntimeError: the loss has no graph, an aligned layer did not run, or the step has its total already.
        """
        config = self.state.config
        self._check_total(loss)
        self._has_total = True
        self._lm, self._weight = loss.detach(), float((config.align_weight if weight is None else weight) or 0.0)
        world = world_size()
        distributed = world > 1
        with torch.no_grad():
            if config.align:
                self.alignment = self._all_statistics(of, distributed).evaluate(config)
            if config.balance:
                weights = self._recorded[WEIGHTS]
                self.balance = Balance.of(weights, self.counting, config.balance, distributed=distributed)
        recorded, self._recorded = self._recorded, {LATENT: {}, WEIGHTS: {}}
        factors = {LATENT: self._weight * scale, WEIGHTS: config.balance_weight * scale}
        # Data parallelism averages gradients over the processes; the statistics are of the whole batch already. Each
        # of several micro-batches holds a share of the value, and its tokens' whole gradient.
        parts = 1 if of is None else of.parts
        of_gradients = {LATENT: factors[LATENT] * world * parts, WEIGHTS: factors[WEIGHTS] * world}
        # Even if it adds nothing: recomputed layers look for the step.
        loss = _total(loss, self, factors, of_gradients, recorded)
        if config.spectral:
            self.spectral = torch.stack([of_layer() for of_layer in self.state.spectral]).sum()
            loss = (loss + (config.spectral_weight * scale) * self.spectral).to(loss.dtype)
        return loss

    def _all_statistics(self, of: MicroBatchShare | None, distributed: bool) -> Statistics:
        """What this step's alignment is about: all processes' tokens, and those of other micro-batches."""
        kind, queue = self.state.config.align_accumulation, self.state.queue
        if of is not None:
            return of.statistics
        if kind == "exact":
            raise RuntimeError(
                'align_accumulation="exact" aligns the micro-batches of a step as one batch: gather their statistics '
                "first, union = align_statistics(model, batches), then step.total(loss, of=part) for each part"
            )
        own: Any = self.statistics()
        own = together = own.over_processes() if distributed else own
        if kind == "queue":
            for past in queue:
                together = together.merge(past)
            self._own = own
        return together

    def _check_total(self, loss: Tensor) -> None:
        if not loss.requires_grad:
            raise RuntimeError(
                "the loss has no graph to reach the adapters: is the model under no_grad? Reentrant activation "
                "checkpointing needs model.enable_input_require_grads()"
            )
        missing = [name for layer, name in enumerate(self.state.names) if layer not in self.seen]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self.state.names)} aligned layers did not run in this step, the first "
                f"is {missing[0]!r}: leave layers that the model skips out by exclude_modules, unmerge() merged ones"
            )
        if self._has_total:
            raise RuntimeError("this step has its total already: add the losses first, then step.total(sum) once")

    def parts(self) -> LossReport:
        """The losses of this step, as numbers; after total(loss)."""
        if self._lm is None:
            raise RuntimeError("this step has no losses yet: call step.total(loss) first")
        state, alignment = self.state, self.alignment
        per_layer = [] if alignment is None else zip(state.names, alignment.per_layer.tolist(), strict=True)
        return LossReport(
            lm=float(self._lm),
            align=0.0 if alignment is None else float(alignment.value),
            weight=self._weight,
            per_layer=dict(per_layer),
            per_task=[] if alignment is None else alignment.statistics.per_task(state.config),
            balance=None if self.balance is None else float(self.balance.value),
            spectral=None if self.spectral is None else float(self.spectral.detach()),
        )


class _Total(torch.autograd.Function):
    """loss + Σ factor * value, whose backward arms the step before the loss's own backward runs."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, step: AlignStep, factors: dict[int, float], of_gradients: dict[int, float],
        recorded: dict[int, Latents],
    ) -> Tensor:  # fmt: skip
        ctx.step, ctx.layers = step, [(output, layer) for output, latents in recorded.items() for layer in latents]
        ctx.factors = of_gradients
        # Freed when the loss's graph is.
        ctx.save_for_backward(*(recorded[output][layer] for output, layer in ctx.layers))
        total = loss
        for output, part in {LATENT: step.alignment, WEIGHTS: step.balance}.items():
            if part is not None:
                total = torch.add(total, part.value.to(total.device), alpha=factors[output])
        return total.to(loss.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        recorded: dict[int, Latents] = {LATENT: {}, WEIGHTS: {}}
        for (output, layer), tensor in zip(ctx.layers, ctx.saved_tensors, strict=True):
            recorded[output][layer] = tensor
        ctx.step.prepare_gradients(d_total, ctx.factors, recorded)
        return d_total, None, None, None, None


_total = apply_of(_Total)
