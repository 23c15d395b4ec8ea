"""A model's buffers, which a forward may change (running statistics, averages, counts): what they were, and back.

The packed weights of quantised linear layers are none of these.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

Place = tuple[nn.Module, str]


def places(model: nn.Module) -> Iterator[tuple[str, Place]]:
    """Every persistent buffer, one that is None so far too, by its name in the model: its module, its name there."""
    for name, module in model.named_modules(remove_duplicate=False):
        if not module._buffers:
            continue
        weight = getattr(module, "weight", None) if hasattr(module, "in_features") else torch.empty(0)
        if isinstance(weight, Tensor) and weight.is_floating_point():  # else it is packed
            for key in module._buffers:
                if key not in module._non_persistent_buffers_set:
                    yield f"{name}.{key}" if name else key, (module, key)


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Gives the buffers back in the end, the same tensors with the same values."""
    held = [(place, place[0]._buffers[place[1]]) for _, place in places(model)]
    copies = [(place, buffer, buffer.clone() if buffer is not None else None) for place, buffer in held]
    try:
        yield
    finally:
        for (module, key), buffer, value in copies:
            if buffer is not None and value is not None:
                buffer.detach().copy_(value)
            module._buffers[key] = buffer


@torch.no_grad()
def assign(found: Mapping[str, Place], values: Mapping[str, Tensor | None], like: Tensor) -> None:
    """Gives buffers new values, which may have other sizes, or none.

    Args:
        found: the buffers, by name.
        values: by the same names; copied.
        like: on the device of a buffer that there is not yet.
    """
    for name, value in values.items():
        module, key = found[name]
        old = module._buffers[key]
        if old is not None and value is not None and old.shape == value.shape:
            old.copy_(value)
        else:
            module._buffers[key] = None if value is None else value.to((like if old is None else old).device, copy=True)


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two buffers hold the same, NaN included; the first in the second's dtype, to which a model was cast."""
    if a is None or b is None:
        return a is b
    a = a.to(b)
    return a.shape == b.shape and torch.equal(*(t.reshape(-1).contiguous().view(torch.uint8) for t in (a, b)))
