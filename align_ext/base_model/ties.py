"""Has transformers tie the weights of a model whose tied modules we have wrapped."""

from typing import Any

from torch import nn

from align_ext.adapters.adapted_linear import AdaptedModule

_KEYS = "_tied_weights_keys"  # of a PreTrainedModel: {"lm_head.weight": "model.embed_tokens.weight"}


def follow_ties(model: nn.Module) -> None:
    """Makes model.tie_weights(), which FSDP's preparation calls, tie the base layers of wrapped modules."""
    for module in model.modules():
        keys: Any = getattr(module, _KEYS, None)
        if isinstance(keys, dict):
            renamed = {_inner_name(module, target): _inner_name(module, source) for target, source in keys.items()}
            if renamed != keys:
                module.__dict__[_KEYS] = renamed


def restore_ties(model: nn.Module) -> None:
    """Undoes follow_ties."""
    for module in model.modules():
        module.__dict__.pop(_KEYS, None)


def _inner_name(model: nn.Module, name: str) -> str:
    """Returns the name of a tensor, which may be a pattern, with base_layer where its module is wrapped."""
    owner, _, part = name.rpartition(".")
    wrapped = isinstance(dict(model.named_modules(remove_duplicate=False)).get(owner), AdaptedModule)
    return f"{owner}.base_layer.{part}" if wrapped else name
