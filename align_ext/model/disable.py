"""Runs a model as its base, for the reference of DPO, KTO or GRPO, or to compare: `with disable_adapter(model)`."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import nn

from align_ext.adapters.adapted_block import Adapted, adapted_layers
from align_ext.adapters.adapted_linear import AdaptedModule
from align_ext.alignment.model_state import require_state
from align_ext.base_model.modules_to_save import find_extra_tensors, plain_name, tensors_of
from align_ext.base_model.sharded import refuse_sharded


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Lets a model compute as its base until the block ends, without a copy of it.

    Adapters are passed over; parameters that are trained beside them have their values of the base, as in PEFT, and
    statistics that training changes (BatchNorm's) stay. Task ids are accepted and ignored, no step is opened, and one
    that is open goes on after the block. A PeftModel that was adopted has this as its own method.

    Args:
        model: a model with adapters, in training or evaluation; may be called any number of times in the block.

    Yields:
        The model.

    Raises:
        ValueError: it has no adapters, they are merged into the weights, it is disabled already, or what it trains
            beside them is divided among processes.
    """
    state, layers = require_state(model), adapted_layers(model)
    if state.disabled:
        raise ValueError("the adapters are disabled already: leave the inner disable_adapter out")
    refuse_merged(layers)
    with ExitStack() as stack:
        for module, name, value in _trained_beside(model):
            stack.callback(module._parameters.__setitem__, name, module._parameters[name])
            module._parameters[name] = value
        for layer in (module for module in model.modules() if isinstance(module, AdaptedModule)):
            stack.callback(setattr, layer, "disabled", False)
            layer.disabled = True
        stack.callback(setattr, state, "disabled", False)
        state.disabled = True
        yield model


def refuse_merged(layers: Mapping[str, Adapted]) -> None:
    """Raises ValueError if the adapter of a layer is merged into its weight."""
    merged = next((name for name, layer in layers.items() if getattr(layer, "merged", False)), None)
    if merged is not None:
        raise ValueError(f"the adapter of {merged} is merged into its weight: unmerge it first")


def _trained_beside(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Yields the place of each parameter that is trained beside the adapters, and its value in the base, frozen."""
    originals, beside = require_state(model).originals, find_extra_tensors(model).tensors
    if not beside.keys() & tensors_of(model).keys():
        return
    refuse_sharded(model, "disable_adapter")
    for place, module in model.named_modules():
        for name, parameter in module._parameters.items():
            plain = plain_name(model, f"{place}.{name}" if place else name)
            if parameter is None or plain not in beside or not parameter.requires_grad:
                continue
            if plain not in originals:
                raise ValueError(
                    f"{plain} is trained beside the adapters, and its value in the base model is not kept: name its "
                    "module in modules_to_save to have it kept"
                )
            value = originals[plain].to(parameter)
            yield module, name, nn.Parameter(value, requires_grad=False)
