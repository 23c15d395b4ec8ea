"""An adapter beside a whole attention or MLP block: mtLoRA's block-level adaptation (2603.01526)."""

from typing import Any

from torch import Tensor, nn

from align_ext.adapters.adapted_experts import AdaptedParameter
from align_ext.adapters.adapted_linear import AdaptedLinear, AdaptedModule


class AdaptedBlock(AdaptedModule):
    """A frozen block F with a parallel low-rank path: out = F(u) + Delta(u), u the block's (normalised) input.

    Delta is the adapter with no base of its own: its base_out is what the block returned, which may be a tensor or a
    tuple that begins with it.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Computes F(u) + Delta(u), in the form that F gives; u is hidden_states, or the first argument."""
        if self.disabled:
            return self.base_layer(*args, **kwargs)
        u: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        output = self.base_layer(*args, **kwargs)
        first = output[0] if isinstance(output, tuple) else output
        y = self.adapter(u.to(first.dtype), base_out=first)
        return (y, *output[1:]) if isinstance(output, tuple) else y

    def unmergeable_reason(self) -> str:
        """Why not: it stands beside several layers."""
        return "it stands beside a whole block, which has no one weight: keep it as an adapter"

    def __getattr__(self, name: str) -> Any:
        """Looks further attributes (layer_idx, is_causal, ...) up in the block, since models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


Adapted = AdaptedLinear | AdaptedBlock | AdaptedParameter


def adapted_layers(model: nn.Module) -> dict[str, Adapted]:
    """The adapted layers, blocks and tensors of experts of a model by name.

    Raises:
        ValueError: there are none.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Adapted)}
    if not layers:
        raise ValueError("the model has no adapters: call replace_linear_with_align_lora(model) first")
    return layers
