"""Some rows of an embedding [V, H] trained beside it, and of the output head that is tied to it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from align_ext.adapters.adapted_linear import AdaptedModule


class TokenRows(nn.Module):
    """Trained values of some rows of a weight, in place of the weight's own (PEFT's trainable_token_indices).

        of an embedding    y[t] = c rows[i]  where ids[t] = tokens[i], the base's y[t] elsewhere; c its embed_scale
        of a head          y[t, tokens[i]] = x[t] rows[i] + bias[tokens[i]], the base's y elsewhere

    Both modules of a tie have the same TokenRows. No weight of the model's size is made.

    Args:
        tokens: different numbers of rows of the weight, k of them.
        values: the rows' first values [k, H].
        padding_idx: the row that gets no gradient from the embedding, as in nn.Embedding.
    """

    tokens: Tensor
    ordered: Tensor
    order: Tensor

    def __init__(self, tokens: Sequence[int], values: Tensor, padding_idx: int | None = None) -> None:
        super().__init__()
        self.rows = nn.Parameter(values)
        given = list(tokens)
        order = sorted(range(len(given)), key=given.__getitem__)
        self.padding = given.index(padding_idx) if padding_idx in given else None
        for name, numbers in {"tokens": given, "ordered": [given[i] for i in order], "order": order}.items():
            self.register_buffer(name, torch.tensor(numbers, device=values.device), persistent=False)

    def forward(self, x: Tensor, base: nn.Module, y: Tensor) -> Tensor:
        """Puts the rows' outputs into y, what the base module returned for x."""
        if isinstance(base, nn.Embedding):
            place = torch.searchsorted(self.ordered, x).clamp(max=len(self.ordered) - 1)
            is_ours = (self.ordered[place] == x)[..., None]
            values = functional.embedding(self.order[place], self.rows.to(base.weight.dtype), self.padding)
            scale: Any = getattr(base, "embed_scale", None)
            if scale is not None:
                values = values * (scale.to(values.dtype) if isinstance(scale, Tensor) else scale)
            return torch.where(is_ours, values.to(y.dtype), y)
        bias: Any = getattr(base, "bias", None)
        values = functional.linear(x, self.rows.to(x.dtype), None if bias is None else bias[self.tokens].to(x.dtype))
        return y.index_copy_(-1, self.tokens, values.to(y.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """The weight with the trained rows, [V, H]."""
        return weight.index_copy(0, self.tokens, self.rows.to(weight.dtype))

    def extra_repr(self) -> str:
        """How many rows there are."""
        return f"rows={len(self.rows)}"


class TrainedRows(AdaptedModule):
    """A frozen embedding, or an output head, of which some rows are trained."""

    adapter: TokenRows  # type: ignore[assignment]

    def __init__(self, base_layer: nn.Module, rows: TokenRows) -> None:
        super().__init__(base_layer, rows)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight with the trained rows, for what reads it past forward."""
        weight: Tensor = self.base_layer.weight  # type: ignore[assignment]
        return weight if self.disabled else self.adapter.merged(weight)

    @torch.no_grad()
    def merge(self) -> None:
        """Puts the trained rows into the weight."""
        self.base_layer.weight.copy_(self.adapter.merged(self.base_layer.weight))  # type: ignore[operator, arg-type]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Computes the base module with the trained rows; the base alone while disabled."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        return y if self.disabled else self.adapter(x, self.base_layer, y)

    def __getattr__(self, name: str) -> Any:
        """Looks further attributes (embedding_dim, padding_idx, ...) up in the base module, since models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)
