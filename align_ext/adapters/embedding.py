"""An embedding with an adapter beside it: LoRA of a table of vectors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.adapters.base import Adapter, Factors
from align_ext.adapters.dora import scale_of
from align_ext.alignment.model_state import AlignState
from align_ext.config import AlignLoraConfig


class EmbeddingAdapter(Adapter):
    """One adapter of an embedding E [V, m]; c is the number by which some models multiply what they look up.

        z = A[:, ids]                   [T, r]
        y = c E[ids] + c s B z          [..., m]

    DoRA multiplies y by m / ||E + s A^T B^T||, the norms those of the columns [m] (adapters/dora.py). There is no
    dropout, and z, which says which token it is of and no more, is not aligned.
    """

    def __init__(self, config: AlignLoraConfig, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features, out_features)
        self.lora_embedding_A = nn.Parameter(torch.empty(self.r, in_features))
        self.lora_embedding_B = nn.Parameter(torch.empty(out_features, self.r))

    @property
    def lora_A(self) -> nn.Parameter:  # type: ignore[override]
        """A [r, V]."""
        return self.lora_embedding_A

    @property
    def lora_B(self) -> nn.Parameter:  # type: ignore[override]
        """B [m, r]."""
        return self.lora_embedding_B

    @override
    def reset_lora_parameters(self, weight: Tensor | None) -> None:
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B)

    @override
    def join(self, state: AlignState, name: str) -> None:
        self.state = state

    def forward(self, ids: Tensor, base: nn.Embedding, y: Tensor) -> Tensor:  # type: ignore[override]
        """Adds c s B z to y, what the base returned for ids."""
        z = functional.embedding(ids, self.lora_embedding_A.T, base.padding_idx)
        low = z @ self.lora_embedding_B.T
        scale: Any = getattr(base, "embed_scale", None)
        low = low if scale is None else low * (scale.to(low.dtype) if isinstance(scale, Tensor) else scale)
        return self.hand_over(None, ids, y.add(low, alpha=self.scaling).to(y.dtype), z.flatten(0, -2))

    @override
    def delta_factors(self) -> list[Factors]:
        return [(self.lora_embedding_A, self.lora_embedding_B)]


class AdaptedEmbedding(AdaptedLinear):
    """A frozen embedding with an adapter beside it."""

    adapter: EmbeddingAdapter

    @override
    def forward(self, ids: Tensor) -> Tensor:
        """Computes what the base looks up + low rank, [..., m]; the base alone while merged or disabled."""
        y: Tensor = self.base_layer(ids)
        if self.merged or self.disabled:
            return y
        y = self.adapter(ids, self.base_layer, y)
        magnitude = self.adapter.lora_magnitude_vector
        return y if magnitude is None else (y * scale_of(magnitude, self.row_norms())).to(y.dtype)

    @override
    def has_own_forward(self) -> bool:
        return unsuitable_embedding(self.base_layer) is not None

    def __getattr__(self, name: str) -> Any:
        """Looks further attributes (embedding_dim, padding_idx, ...) up in the embedding, since models read them."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_layer"), name)


def unsuitable_embedding(module: nn.Module) -> str | None:
    """Returns why nothing can be trained beside a module's weight as beside an embedding's, or None."""
    if not isinstance(module, nn.Embedding):
        return "is no embedding"
    if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
        return "has max_norm, scale_grad_by_freq or sparse"
    if type(module).forward is not nn.Embedding.forward and not hasattr(module, "embed_scale"):
        return f"({type(module).__name__}) has a forward of its own"
    return None
