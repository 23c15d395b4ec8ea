"""Finds the weights of which some rows are trained (trainable_token_indices), with all modules that share them."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.embedding import unsuitable_embedding
from align_ext.adapters.linear_layer import has_float_weight
from align_ext.adapters.trained_rows import TokenRows, TrainedRows
from align_ext.base_model.modules_to_save import is_inside, plain_name
from align_ext.base_model.select_layers import embeddings_of
from align_ext.base_model.sharded import full_shapes, full_values
from align_ext.config import AlignLoraConfig


@dataclass(frozen=True)
class RowsToTrain:
    """One weight of which rows are trained.

    Attributes:
        name: the module that holds it, in the plain model; the one that the options name.
        module: that module.
        shared: other modules that hold the same weight, by name.
        tokens: the numbers of the rows.
    """

    name: str
    module: nn.Module
    shared: dict[str, nn.Module]
    tokens: tuple[int, ...]

    def empty(self) -> Tensor:
        """Returns a tensor of the rows' shape on the meta device."""
        return torch.empty(len(self.tokens), _full_shape(self.module)[1], device="meta")

    def wrappers(self, config: AlignLoraConfig) -> dict[nn.Module, TrainedRows]:
        """Returns what takes the place of each of the modules; the rows have the values of the base."""
        weight: Any = self.module.weight
        dtype = weight.dtype if config.adapter_dtype == "base" else torch.promote_types(torch.float32, weight.dtype)
        if weight.is_meta:
            values = self.empty().to(dtype)
        else:
            whole = full_values({self.name: weight}, "trainable_token_indices")[self.name]
            values = whole[list(self.tokens)].to(weight.device, dtype)
        rows = TokenRows(self.tokens, values, getattr(self.module, "padding_idx", None))
        return {
            module: TrainedRows(module, rows).train(module.training) for module in (self.module, *self.shared.values())
        }


def rows_to_train(model: nn.Module, config: AlignLoraConfig, taken: Collection[str]) -> list[RowsToTrain]:
    """Returns the weights of which trainable_token_indices trains rows.

    Args:
        model: a model without these rows.
        config: the options.
        taken: names in the plain model of modules that are adapted or trained whole.

    Raises:
        ValueError: there is no such module or token, or it cannot be trained by rows; the message names the cure.
    """
    found: dict[int, RowsToTrain] = {}
    for name, module, tokens in _named(model, config):
        plain, weight = plain_name(model, name), getattr(module, "weight", None)
        what = f"trainable_token_indices: {plain}"
        if not has_float_weight(module) or not isinstance(module, (nn.Embedding, nn.Linear)):
            raise ValueError(
                f"{what} is a {type(module).__name__}, not an embedding or a head of floating-point numbers"
            )
        assert isinstance(weight, nn.Parameter)
        if (most := max(tokens)) >= _full_shape(module)[0]:
            raise ValueError(
                f"{what} has {_full_shape(module)[0]} rows, and none of token {most}: give the model more before "
                "(resize_token_embeddings)"
            )
        holders = [(n, m) for n, m in model.named_modules() if getattr(m, "_parameters", {}).get("weight") is weight]
        for other, holder in holders:
            if is_inside(f"{plain_name(model, other)}.", taken):
                raise ValueError(f"{what} is adapted or trained whole too ({plain_name(model, other)}): choose one")
            if reason := _unsuitable(holder):
                raise ValueError(
                    f"{what}: {plain_name(model, other)} {reason}, so that not some rows alone can be trained"
                )
        same = found.get(id(weight))
        if same is not None and same.tokens != tokens:
            raise ValueError(
                f"{what} and {same.name} are one tensor, of which two sets of rows are named: give both the same, or "
                "load the base with tie_word_embeddings=False"
            )
        if len(holders) > 1 and embeddings_of(model, "input") not in [m for _, m, _ in _named(model, config)]:
            other = next(plain_name(model, n) for n, m in holders if m is not module)
            raise ValueError(
                f"{what} and {other} are one tensor: name the input embeddings, whose rows are those of both, or load "
                "the base with tie_word_embeddings=False"
            )
        shared = {plain_name(model, other): holder for other, holder in holders if holder is not module}
        if same is None:
            found[id(weight)] = RowsToTrain(plain, module, shared, tokens)
    return list(found.values())


def _named(model: nn.Module, config: AlignLoraConfig) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Yields name, module and rows of each module that the option names, in the model's order."""
    option = config.trainable_token_indices
    if not option:
        return
    if not isinstance(option, Mapping):
        embedding = embeddings_of(model, "input")
        if embedding is None:
            raise ValueError(
                "trainable_token_indices: the model does not say which its input embeddings are: give their name, "
                '{"embed_tokens": [...]}'
            )
        yield next((name, module, option) for name, module in model.named_modules() if module is embedding)
        return
    modules = dict(model.named_modules())
    for wanted in option:
        if not any(f".{name}".endswith(f".{wanted}") for name in modules):
            raise ValueError(f"trainable_token_indices: the model has no module {wanted!r}")
    for name, module in modules.items():
        for wanted, tokens in option.items():
            if f".{name}".endswith(f".{wanted}"):
                yield name, module, tuple(tokens)


def _full_shape(module: Any) -> torch.Size:
    return full_shapes({"weight": module.weight})["weight"].shape


def _unsuitable(module: nn.Module) -> str | None:
    """Returns why rows of a module's weight cannot be trained beside it, or None."""
    if type(module).forward is nn.Linear.forward:
        return None
    return unsuitable_embedding(module)


def wrappers_of(model: nn.Module) -> dict[nn.Module, TrainedRows]:
    """Returns what stands in the place of each module of the base of which rows are trained."""
    return {module.base_layer: module for module in model.modules() if isinstance(module, TrainedRows)}


def put(model: nn.Module, places: Mapping[nn.Module, nn.Module]) -> None:
    """Puts modules in the place of others, under each of their names."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in places:
                parent._modules[name] = places[child]
