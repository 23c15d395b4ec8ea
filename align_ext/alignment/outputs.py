"""The outputs that layers hand over to a training step, and in backward the gradients in them.

The outputs are the layers' own tensors, not copies (a compiled graph's are). The step holds them until its loss is
made, then the loss node does, as what it saved for backward: they go when autograd frees the loss's graph.
"""

import warnings
from typing import Any

import torch
from torch import Tensor

from align_ext.alignment.model_state import AlignState
from align_ext.alignment.tap import LATENT, WEIGHTS, as_key, register_step, tap
from align_ext.alignment.tokens import StepTokens
from align_ext.losses.tokens import Latents

_NOT_DIFFERENTIATED = (
    "backward reached an aligned layer, but not the alignment loss: differentiate step.total(loss), or the loss of "
    "model(..., task_ids=ids); align_step(..., strict=False) allows it, and the layer then gets no alignment gradient"
)


class StepOutputs(StepTokens):
    """The latents z of the layers that ran in one forward, the routers' weights w, and the gradients in both.

    Args:
        state: the model's.
        ids: [B] or [B, S]; None: all tokens are of one task (where no loss tells tasks apart).
        like: a tensor on the device of the ids.
        strict: whether a backward through the layers without the loss is an error.
        records: whether layers hand over their outputs (in training).
    """

    written = torch.zeros(
        (), dtype=torch.int64, device="cpu"
    )  # the argument that record_ (tap.py) writes, for all steps

    def __init__(
        self, state: AlignState, ids: Tensor | None, like: Tensor, *, strict: bool = True, records: bool = True
    ) -> None:
        super().__init__(state, ids, like, records=records)
        self.strict = strict
        self.number = register_step(self)
        self.key = as_key(self.number)
        self.seen: set[int] = set()  # the layers that ran
        self.is_differentiated = False
        self._recorded: dict[int, Latents] | None = {LATENT: {}, WEIGHTS: {}}  # None: the loss has them
        # Seed and offset of each layer's dropout mask, [layers, 2], drawn here and not where a layer needs them:
        # checkpointed code must draw as often when it is recomputed.
        draws = records and state.config.lora_dropout > 0 and not like.is_meta
        self.seeds = torch.randint(2**63 - 1, (len(state.names), 2), device=like.device) if draws else None
        self._rngs: dict[torch.device, tuple[Tensor, ...]] = {}
        self._gradients: dict[int, Latents] | None = None  # inside backward: the gradients that no layer has popped yet

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

    def rng_of(self, adapter: Any, device: torch.device) -> Tensor | None:
        """Seed and offset of a layer's dropout mask in this step, int64 [2]; None: the operator draws them."""
        if self.seeds is None:
            return None
        if torch.compiler.is_compiling():  # by a tensor, which is no constant of the graph
            return self.seeds.to(device).index_select(0, adapter.layer_index.to(device))[0]
        if device not in self._rngs:
            self._rngs[device] = self.seeds.to(device).unbind(0)
        return self._rngs[device][adapter.layer]

    def _hand_over(self, adapter: Any, output_of_layer: Tensor, output: int) -> None:
        if torch.compiler.is_compiling():
            torch.ops.align_ext.record_(self.written, output_of_layer, self.key, adapter.layer_key, output)
        else:
            self.record(adapter.layer, output_of_layer, output)

    def record(self, layer: int, z: Tensor, output: int = LATENT) -> None:
        """Records an output of a layer that ran; a second time is an error."""
        if torch._C._current_graph_task_id() != -1:
            return  # activation checkpointing recomputes the layer inside backward: its z is here already
        if self._recorded is None or layer in self._recorded[output]:
            raise RuntimeError(
                f"the aligned layer {self.state.names[layer]!r} ran twice in one step: use one align_step (or one "
                "task_ids= call) per forward; a layer that the model runs several times in a forward (ALBERT's) cannot "
                "be aligned: leave it out by exclude_modules, or adapt the model with align=None"
            )
        self.check_tokens(layer, z.shape[0])
        self.seen.add(layer)
        self._recorded[output][layer] = z

    @property
    def recorded(self) -> dict[int, Latents]:
        """The outputs by their kind, then by layer, until the loss is made."""
        assert self._recorded is not None
        return self._recorded

    def release(self) -> dict[int, Latents]:
        """Gives the recorded outputs to the loss node; nothing is recorded afterwards."""
        recorded, self._recorded = self.recorded, None
        return recorded

    def pop_gradient(self, layer: int, output: int = LATENT) -> Tensor | None:
        """The gradient in a layer's output, the caller's own from now on; None outside the loss's backward."""
        if self._gradients is None:
            if self.strict and not self.is_differentiated:
                raise RuntimeError(_NOT_DIFFERENTIATED)
            return None
        if output not in self._gradients:
            return None
        if layer not in self._gradients[output]:
            raise RuntimeError(f"one backward reached the aligned layer {self.state.names[layer]!r} twice")
        return self._gradients[output].pop(layer)

    def hand_out(self, gradients: dict[int, Latents]) -> None:
        """Holds the gradients in the outputs for the layers to pop until the running backward ends."""
        self._gradients, self.is_differentiated = gradients, True
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
        self.after_backward()
        self.state.in_backward[:] = [step for step in self.state.in_backward if step is not self]

    def after_backward(self) -> None:
        """Runs when the backward through the loss has ended."""
