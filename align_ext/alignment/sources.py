"""Watches the parts of an encoder-decoder, to find out whose tokens each adapted layer sees (tokens.py)."""

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.alignment.model_state import AlignState
from align_ext.alignment.tokens import DECODER, ENCODER, place_of

_DECODER_INPUT = "decoder_input"  # how the arguments for the decoder's tokens begin: _ids, s_embeds, _values


def watch_parts(model: nn.Module, state: AlignState) -> list[Any]:
    """Registers what sees an encoder-decoder's parts run; returns the handles, none for other models.

    Raises:
        ValueError: an option has no meaning for an encoder-decoder, or the model does not say which parts it has.
    """
    whole = encoder_decoder(model)
    if whole is None or not state.config.needs_step:
        return []
    _check(state)
    encoder, decoder = _parts(whole)
    state.encoder_decoder = True
    before = decoder.register_forward_pre_hook(partial(_before_decoder, state), with_kwargs=True)
    return [encoder.register_forward_hook(partial(_after_encoder, state)), before]


def watch_layers(model: nn.Module, state: AlignState) -> None:
    """Registers what finds the sources of an encoder-decoder's adapted layers; the hooks go with the layers.

    A layer is found by the part that it is in and by its first input, which is the encoder's output itself in the
    projections of keys and values of cross-attention.
    """
    if not state.encoder_decoder:
        return
    encoder, decoder = _parts(encoder_decoder(model))
    inside = {layer: part for part, whole in ((ENCODER, encoder), (DECODER, decoder)) for layer in whole.modules()}
    for layer in model.modules():
        adapter: Any = layer._modules.get("adapter")
        if getattr(adapter, "state", None) is state and adapter.layer is not None:
            layer.register_forward_pre_hook(partial(_before_layer, inside.get(layer)), with_kwargs=True)


def encoder_decoder(model: nn.Module) -> nn.Module | None:
    """The encoder-decoder that a model is or wraps; None if its forward takes no tokens for a decoder."""
    for module in model.modules():
        if hasattr(module, "get_encoder") and any(
            name.startswith(_DECODER_INPUT) for name in inspect.signature(type(module).forward).parameters
        ):
            return module
    return None


def _parts(whole: Any) -> tuple[nn.Module, nn.Module]:
    encoder, decoder = whole.get_encoder(), whole.get_decoder()
    inside = set(encoder.modules()) & set(decoder.modules()) if encoder is not None and decoder is not None else {whole}
    if whole in inside or encoder in inside or decoder in inside:
        raise ValueError(
            f"{type(whole).__name__} does not say which part is its encoder and which its decoder (get_encoder, "
            "get_decoder), so that nothing knows which tokens are padding: adapt it with align=None"
        )
    return encoder, decoder


def _check(state: AlignState) -> None:
    config = state.config
    if config.response_only:
        raise ValueError(
            "response_only=True: an encoder's tokens have no labels, and of a decoder's those with a label count "
            "anyway: leave it out (and the encoder's layers by exclude_modules, to align the answers alone)"
        )
    if config.routing == "sequence":
        raise ValueError(
            'routing="sequence" pools over the prompt before an answer, and an encoder-decoder\'s decoder has none: '
            'use routing="token"'
        )


def _step(state: AlignState) -> Any:
    step = None if torch.compiler.is_compiling() else state.current
    return step if step is not None and step.records else None


def _after_encoder(state: AlignState, encoder: nn.Module, args: Any, output: Any) -> None:
    step = _step(state)
    if step is not None:
        first = output if isinstance(output, Tensor) else output[0]
        step.memories.append(place_of(first))


def _before_decoder(state: AlignState, decoder: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    """Some models project what the encoder made before their decoder gets it."""
    step = _step(state)
    memory = kwargs.get("encoder_hidden_states")
    if step is not None and isinstance(memory, Tensor):
        step.memories.append(place_of(memory))


def _before_layer(part: str | None, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    state, number = layer.adapter.state, layer.adapter.layer
    step = None if number in state.sources else _step(state)
    if step is not None:
        step.learn(number, kwargs["hidden_states"] if "hidden_states" in kwargs else args[0], part)
