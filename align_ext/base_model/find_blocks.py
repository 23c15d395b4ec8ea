"""Finds the attention and MLP blocks of a transformer by their structure, whatever their classes are called."""

from collections.abc import Collection, Iterator

from torch import nn

from align_ext.adapters.linear_layer import features_of, is_conv1d


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
    blocks: dict[str, tuple[nn.Module, int]] = {}
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
                blocks[f"{name}.{child}" if name else child] = (children[child], hidden)
    if not blocks:
        raise ValueError(
            f"target_blocks={tuple(kinds)!r}: found no layers of one attention and one MLP block of linear layers, as "
            "Llama, GPT-2, Falcon and ViT have them; use target_blocks=() to adapt linear layers by target_modules"
        )
    return blocks


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
