"""Finds the attention and MLP blocks of a transformer by their structure, whatever their classes are called."""

from collections.abc import Collection, Iterator
from typing import NamedTuple

from torch import nn

from align_ext.adapters.linear_layer import features_of, is_conv1d
from align_ext.alignment.sources import encoder_decoder
from align_ext.config import AlignLoraConfig
from align_ext.system.messages import shown


def find_blocks(model: nn.Module, kinds: Collection[str]) -> dict[str, tuple[nn.Module, int]]:
    """Finds the blocks of every decoder layer.

    A layer holds one attention block (linear layers, and heads) and one MLP block (several linear layers, from and to
    the hidden size), as in Llama, GPT-2, Falcon and ViT.

    Args:
        model: a transformer.
        kinds: "attention", "mlp" or both.

    Returns:
        name -> (block, hidden size).

    Raises:
        ValueError: there are no such layers.
    """
    blocks = dict(_blocks(model, kinds))
    if not blocks:
        raise ValueError(
            f"target_blocks={tuple(kinds)!r}: found no layers of one attention and one MLP block of linear layers, as "
            "Llama, GPT-2, Falcon and ViT have them; use target_blocks=() to adapt linear layers by target_modules"
        )
    return blocks


class BlockPart(NamedTuple):
    """The place of a layer in a mixture's block.

    Attributes:
        block: the block's name.
        hidden: the width of its input.
        routes: whether the layer holds the block's router: the first one that is adapted does.
    """

    block: str
    hidden: int
    routes: bool


def mixture_parts(model: nn.Module, config: AlignLoraConfig, layers: Collection[str]) -> dict[str, BlockPart]:
    """Returns the places of those layers that are in feed-forward blocks, where the architecture mixes such blocks.

    Args:
        model: the model.
        config: the options.
        layers: the names of the layers to adapt, in the model's order.

    Raises:
        ValueError: none of them is in such a block, or the model is an encoder-decoder whose losses need tokens.
    """
    if not config.row.mixture:
        return {}
    parts = dict[str, BlockPart]()
    for block, (_, hidden) in _blocks(model, ("mlp",)):
        inside = [name for name in layers if name.startswith(f"{block}.")]
        parts |= {name: BlockPart(block, hidden, name == inside[0]) for name in inside}
    if not parts:
        raise ValueError(
            f"architecture={config.architecture!r} mixes whole feed-forward blocks, and target_modules="
            f"{shown(config.target_modules)} names no layer in one (a module of linear layers beside the attention, as "
            "Llama's mlp): name such layers, or use lora_moe, whose experts are layers"
        )
    if config.needs_step and encoder_decoder(model) is not None:
        raise ValueError(
            f"architecture={config.architecture!r}: an encoder-decoder's layers are known by the number of their "
            "tokens, and a block of experts runs on several rows a token: use align=None and balance=None, or lora_moe"
        )
    return parts


def _blocks(model: nn.Module, kinds: Collection[str]) -> Iterator[tuple[str, tuple[nn.Module, int]]]:
    """Yields the blocks of these kinds, and their hidden sizes, by name."""
    for name, layer in model.named_modules():
        children = dict(layer.named_children())
        attention = [child for child, module in children.items() if _is_attention(module)]
        if len(attention) != 1:
            continue
        hidden = features_of(next(_linears(children[attention[0]])))[0]
        mlp = [child for child, module in children.items() if child not in attention and _is_mlp(module, hidden)]
        if len(mlp) != 1:
            continue
        for kind, child in (("attention", attention[0]), ("mlp", mlp[0])):
            if kind in kinds:
                yield f"{name}.{child}" if name else child, (children[child], hidden)


def _linears(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if is_conv1d(child) or (hasattr(child, "in_features") and hasattr(child, "out_features")):
            yield child


def has_heads(module: nn.Module) -> bool:
    """Whether a module says how many heads it has or how wide they are, under whatever name (head_dim, n_heads)."""
    return any("head" in name for name in vars(module))


def _is_attention(module: nn.Module) -> bool:
    return has_heads(module) and next(_linears(module), None) is not None


def _is_mlp(module: nn.Module, hidden: int) -> bool:
    sizes = [features_of(linear) for linear in _linears(module)]
    return len(sizes) > 1 and any(n == hidden for n, _ in sizes) and any(m == hidden for _, m in sizes)
