"""capture_latents: the public way to look at latents and routing weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from align_ext.adapters.adapted_block import adapted_layers
from align_ext.adapters.base import Adapter, Captured


@contextmanager
def capture_latents(model: nn.Module) -> Iterator[dict[str, Captured]]:
    """Collects the latents and routing weights of each layer's last forward inside the context.

        with torch.no_grad(), capture_latents(model.eval()) as latents:
            model(**batch)
        z = latents["model.layers.0.self_attn.q_proj"].z

    Args:
        model: with adapters of any kind, in training or evaluation; not compiled.

    Yields:
        Layer name -> Captured, of the layers that ran; without a graph.

    Raises:
        ValueError: the model has no adapters.
    """
    captured: dict[str, Captured] = {}
    adapters = adapters_of(model)
    for name, adapter in adapters.items():
        adapter.capture = partial(captured.__setitem__, name)
    try:
        yield captured
    finally:
        for adapter in adapters.values():
            adapter.capture = None


def adapters_of(model: nn.Module) -> dict[str, Adapter]:
    """The adapters of a model by the names of their layers."""
    return {name: layer.adapter for name, layer in adapted_layers(model).items()}
