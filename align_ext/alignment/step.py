"""One training step's losses on the adapters: task ids in, the layers' latents, one loss node, their gradients out.

    with align_step(model, task_ids, attention_mask) as step:      # forward: layers hand over their latent z
        lm = model(**batch).loss
    step.total(lm).backward()                                      # lm + weight * align (+ ...), one autograd node

or, the same behind forward hooks (forward_hooks.py):  model(**batch, task_ids=task_ids).loss.backward().

In backward the loss node runs first, since the model's own loss hangs below it, and has the step prepare the gradient
in every latent, times what came in. The node behind each layer, which knows the step by a number, hands the layer's
share on as dz (tap.py). So the gradient is exact whatever the training loop does: activation checkpointing of either
kind, accumulation, loss scaling, pending forwards, compilation, data parallelism.
A router's weights w go the same way as the latents; the spectral loss and AdaLoRA's orthogonality depend on parameters
alone and are ordinary autograd.
docs/numerics.md derives the tables; docs/architecture.md follows one batch through these files.
"""

from typing import Any

import torch
from torch import Tensor

from align_ext.alignment.guards import refuse_compiled_autograd, world_size
from align_ext.alignment.loss_report import LossReport
from align_ext.alignment.micro_batch import MicroBatchShare
from align_ext.alignment.model_state import AlignState
from align_ext.alignment.outputs import StepOutputs
from align_ext.alignment.tap import LATENT, WEIGHTS
from align_ext.losses.balance import Balance
from align_ext.losses.statistics import STATISTICS, Alignment, Statistics
from align_ext.losses.tokens import Latents
from align_ext.ops._autograd import apply_of


class AlignStep(StepOutputs):
    """The losses on the adapters of one forward: alignment, balance, and that on parameters alone.

    Args:
        state: the model's.
        ids: [B] or [B, S]; None: all tokens are of one task (where no loss tells tasks apart).
        like: a tensor on the device of the ids.
        strict: whether a backward through the layers without the loss is an error.
        by_keyword: whether the model's own forward opened it.
        records: whether layers hand over their outputs (in training).
    """

    def __init__(
        self, state: AlignState, ids: Tensor | None, like: Tensor, *, strict: bool = True, by_keyword: bool = False,
        records: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(state, ids, like, strict=strict, records=records)
        self.by_keyword = by_keyword
        self.alignment: Alignment | None = None
        self.balance: Balance | None = None
        self.spectral: Tensor | None = None
        self.orthogonality: Tensor | None = None
        self._own: Statistics | None = None  # for the queue, once the loss is differentiated
        self._lm: Tensor | None = None
        self._weight = 0.0

    def statistics(self) -> Statistics:
        """Returns the statistics of this process's tokens; before total."""
        state = self.state
        sizes = len(state.names), state.tasks, state.rank
        return STATISTICS[state.config.align or "kl"].of(
            self.recorded[LATENT], self.aligned_tokens, sizes, state.config
        )

    def differentiate(self, d_total: Tensor, factors: dict[int, float], recorded: dict[int, Latents]) -> None:
        """Computes the gradients in all outputs, for the layers to pop until the running backward ends."""
        refuse_compiled_autograd(ahead=False)
        losses = {LATENT: (self.alignment, self.aligned_tokens), WEIGHTS: (self.balance, self.counting)}
        self.hand_out(
            {
                output: loss.gradients(recorded[output], tokens, d_total, factors[output])
                for output, (loss, tokens) in losses.items()
                if loss is not None
            }
        )

    def after_backward(self) -> None:
        """Adds the statistics to the queue if they and the loss are finite."""
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

        AdaLoRA has orth_reg_weight * orthogonality in the place of the spectral loss, which is one of heads.

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
        self._lm, self._weight = loss.detach(), float((config.align_weight if weight is None else weight) or 0.0)
        world = world_size()
        distributed = world > 1
        with torch.no_grad():
            if config.align:
                self.alignment = self._all_statistics(of, distributed).evaluate(config)
            if config.balance:
                weights = self.recorded[WEIGHTS]
                top_k = config.latents if config.row.mixture else None
                self.balance = Balance.of(weights, self.counting, config.balance, distributed=distributed, top_k=top_k)
        recorded = self.release()
        factors = {LATENT: self._weight * scale, WEIGHTS: config.balance_weight * scale}
        # Data parallelism averages gradients over the processes, but the statistics are those of the whole batch. Each
        # of several micro-batches adds a share of the value, but the whole gradient in its own tokens.
        parts = 1 if of is None else of.parts
        of_gradients = {LATENT: factors[LATENT] * world * parts, WEIGHTS: factors[WEIGHTS] * world}
        # The node is needed even if it adds nothing, since recomputed layers look for the step.
        loss = _total(loss, self, factors, of_gradients, recorded)
        if self.state.of_parameters:
            value = torch.stack([of_layer() for of_layer in self.state.of_parameters]).mean()
            if config.spectral:
                self.spectral, of_value = value, config.spectral_weight
            else:
                self.orthogonality, of_value = value, config.orth_reg_weight or 0.0
            loss = (loss + (of_value * scale) * value).to(loss.dtype)
        return loss

    def _all_statistics(self, of: MicroBatchShare | None, distributed: bool) -> Statistics:
        """Returns the statistics of all tokens that are aligned: of all processes, and of other micro-batches."""
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
        if self._lm is not None:
            raise RuntimeError("this step has its total already: add the losses first, then step.total(sum) once")

    def parts(self) -> LossReport:
        """Returns the losses of this step as numbers; after total(loss)."""
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
            orthogonality=None if self.orthogonality is None else float(self.orthogonality.detach()),
            pairs=None if alignment is None else float(alignment.statistics.pairs(state.config)),
        )


class _Total(torch.autograd.Function):
    """loss + Σ factor * value, whose backward prepares the gradients before the loss's own backward runs."""

    @staticmethod
    def forward(
        ctx: Any, loss: Tensor, step: AlignStep, factors: dict[int, float], of_gradients: dict[int, float],
        recorded: dict[int, Latents],
    ) -> Tensor:  # fmt: skip
        ctx.step, ctx.layers = step, [(output, layer) for output, latents in recorded.items() for layer in latents]
        ctx.factors = of_gradients
        # Saved tensors are freed with the loss's graph.
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
        ctx.step.differentiate(d_total, ctx.factors, recorded)
        return d_total, None, None, None, None


_total = apply_of(_Total)
