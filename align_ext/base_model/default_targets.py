"""Finds the layers that target_modules="auto" means, by a model's structure: those of its feed-forward parts."""

import re
from collections.abc import Collection
from dataclasses import replace

from torch import nn

from align_ext.adapters.linear_layer import features_of
from align_ext.base_model.find_blocks import has_heads
from align_ext.base_model.modalities import other_modalities
from align_ext.base_model.select_layers import embeddings_of, linear_layers
from align_ext.config import AUTO, AlignLoraConfig
from align_ext.system.names import shortest_ends

_GATED = {"gate_proj", "up_proj", "down_proj"}  # the layers that the paper adapts
_ATTENTION = re.compile("attn|attention", re.IGNORECASE)


def with_targets(config: AlignLoraConfig, model: nn.Module) -> AlignLoraConfig:
    """Returns the options with names in place of target_modules="auto".

    A block is a module in a list, such as layers.3. Its linear layers are those of the attention, if they are in a part
    of the block that mixes tokens (a module with heads, or with a convolution over them, or named attention), and
    otherwise those of the feed-forward part, but for routers, whose outputs are narrower than every input of that part.

    Args:
        config: the options.
        model: a plain model; of several modalities, the layers that see the text are meant.

    Returns:
        The options; target_modules are the shortest name suffixes that match, among all linear layers, only: gate_proj,
        up_proj and down_proj of the feed-forward parts, if there are all three; else all layers of these parts; else
        all layers of the blocks (Mamba, mixtures of experts without shared ones; none of these where target_parameters
        names the experts); else all but the output head.
    """
    if config.target_modules != AUTO or config.target_blocks:
        return config
    linears = dict(linear_layers(model))
    head = embeddings_of(model, "output")
    layers = {name: features_of(module) for name, module in linears.items() if module is not head}
    others = other_modalities(model, layers)
    own = [name for name in layers if name not in others] or list(layers)
    blocks = [name for name in own if any(map(str.isdecimal, name.split(".")[:-1]))] or own
    mixing = _mixing_parts(model)
    forward = [name for name in blocks if not _is_in(name, mixing)]
    narrowest = min((layers[name][0] for name in forward), default=0)
    routers = {name for name in forward if layers[name][1] < narrowest}
    forward = [name for name in forward if name not in routers]
    gated = [name for name in forward if name.rpartition(".")[2] in _GATED]
    whole = {name.rpartition(".")[2] for name in gated} == _GATED
    chosen = gated if whole else forward
    if not chosen and config.target_parameters:
        return replace(config, target_modules=())
    chosen = chosen or [name for name in blocks if name not in routers]
    targets = shortest_ends(chosen, linears.keys() - set(chosen))
    return replace(config, target_modules=targets) if targets else config


def _mixing_parts(model: nn.Module) -> set[str]:
    """Returns the names of those parts of blocks that hold heads or a convolution over the tokens."""
    found = [name for name, module in model.named_modules() if name and _mixes_tokens(module)]
    outer = {name[: dot.start()] for name in found for dot in re.finditer(r"\.", name)}
    return {_part_of_block(name) for name in found if name not in outer}


def _mixes_tokens(module: nn.Module) -> bool:
    children = list(module.children())
    return bool(children) and (has_heads(module) or any(isinstance(child, nn.Conv1d) for child in children))


def _part_of_block(name: str) -> str:
    """Returns the name of the part of the innermost block that a module is in, or of a module in no block."""
    parts = name.split(".")
    block = max((i for i, part in enumerate(parts[:-1]) if part.isdecimal()), default=len(parts) - 2)
    return ".".join(parts[: block + 2])


def _is_in(name: str, mixing: Collection[str]) -> bool:
    """Whether a layer is in a part that mixes tokens."""
    parts = name.split(".")
    inner = re.split(r"(?:^|\.)\d+\.", name)[-1]  # the names below the innermost block
    return bool(_ATTENTION.search(inner)) or any(".".join(parts[:i]) in mixing for i in range(1, len(parts)))
