"""Combines trained LoRA adapters of one base model into one, by task arithmetic, TIES or LoRAHub.

adapters = [read_lora(folder) for folder in ("math", "code")]
write_lora(task_arithmetic(adapters, [1.0, 0.5]), "sum")             # exact, the ranks add up
small, error = truncated(ties(adapters, density=0.2), rank=8)        # nearest adapter of rank 8; error per layer
write_lora(small, "ties")
merge_delta(model, ties(adapters, density=0.2))                      # exact, into the base weights
write_lora(combined(adapters, [0.7, 0.4]), "both")                   # A and B separately

align_ext/merging/lorahub.py finds the weights for `combined` from examples.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align_ext.adapters.adapted_experts import ExpertsLora
from align_ext.adapters.adapted_linear import AdaptedLinear
from align_ext.adapters.base import Adapter
from align_ext.adapters.embedding import EmbeddingAdapter
from align_ext.base_model.adopt_peft import PEFT_PREFIX
from align_ext.base_model.fingerprint import BaseModel
from align_ext.config import AlignLoraConfig
from align_ext.io.adapter_folder import OUR_CONFIG, AdapterFolder, adapter_files, key_options, write_json
from align_ext.io.peft_format import PEFT_CONFIG, WEIGHTS, unexportable_reason
from align_ext.system.messages import shown, shown_path
from align_ext.system.tensors import digest_of, write_tensors
from align_ext.system.writing import atomic_folder


@dataclass(frozen=True)
class LoraWeights:
    """The matrices of a LoRA adapter: the change of layer l's weight is B_l A_l.

    Attributes:
        layers: module name -> A [r, n], B [m, r] in float32; B includes the scaling alpha / r.
        config: the content of adapter_config.json, of which a combined adapter keeps base model, task and layers;
            "base" holds the record of the base model, if there is one.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    config: dict[str, Any]

    def deltas(self) -> dict[str, Tensor]:
        """Returns B A of each layer, [m, n]."""
        return {name: B @ A for name, (A, B) in self.layers.items()}


@dataclass(frozen=True)
class DenseDelta:
    """A full-rank change of the weights.

    Attributes:
        layers: module name -> [m, n], float32.
        config: as in LoraWeights.
    """

    layers: dict[str, Tensor]
    config: dict[str, Any]


def read_lora(folder: str | os.PathLike[str]) -> LoraWeights:
    """Reads a plain LoRA adapter that save_adapter, write_lora or PEFT wrote.

    Raises:
        ValueError: it is no adapter folder, or has an adapter of another kind (heads, routers, DoRA, biases).
    """
    stored = AdapterFolder.read(folder)
    reason = uncomposable_reason(stored.adapters, stored.config, stored.trained)
    if reason is not None:
        raise ValueError(f"{shown_path(stored.path)}: only plain LoRA adapters can be composed: {reason}")
    base = {} if stored.base is None else {"base": stored.base.to_dict()}
    config = dict(stored.peft) | {"base_model_name_or_path": stored.base_name} | base
    return LoraWeights(matrices(stored.adapters), config)


def uncomposable_reason(
    adapters: Mapping[str, Adapter], config: AlignLoraConfig, trained: Mapping[str, Tensor]
) -> str | None:
    """Returns why adapters, and what was trained beside them, are no plain LoRA, which adds up with others; or None."""
    if reason := unexportable_reason(adapters, config):
        return reason
    if any(isinstance(adapter, EmbeddingAdapter) for adapter in adapters.values()):
        return "it adapts embeddings"
    if trained or config.lora_bias:
        return "it trains more than A and B"
    return "it is DoRA, whose changes of a weight do not add up" if config.use_dora else None


def matrices(adapters: Mapping[str, Adapter]) -> dict[str, tuple[Tensor, Tensor]]:
    """Returns A and B of adapters by module name, in float32; B includes the scaling."""
    layers = {}
    for name, adapter in sorted(adapters.items()):
        if isinstance(adapter, ExpertsLora):
            raise ValueError(f"only adapters of layers can be composed, and {name} is a tensor of experts")
        terms = adapter.delta_factors()
        A, B = torch.cat([A.detach() for A, _ in terms]), torch.cat([B.detach() for _, B in terms], 1)
        layers[name] = (A.float(), B.float() * adapter.scaling)
    return layers


def write_lora(adapter: LoraWeights, folder: str | os.PathLike[str]) -> None:
    """Writes an adapter atomically to a folder that load_adapter and stock PEFT can read."""
    ranks = {name: len(A) for name, (A, _) in adapter.layers.items()}
    r, options = max(ranks.values()), ("base_model_name_or_path", "task_type", "fan_in_fan_out", "bias")
    content = {name: adapter.config[name] for name in options if name in adapter.config} | {
        "peft_type": "LORA", "r": r, "lora_alpha": r, "lora_dropout": 0.0, "use_rslora": False, "inference_mode": True,
        "target_modules": list(ranks),
    }  # fmt: skip
    if len(set(ranks.values())) > 1:
        content |= {"rank_pattern": ranks, "alpha_pattern": ranks}
    tensors = {
        f"{PEFT_PREFIX}{name}.lora_{part}.weight": weight.contiguous()
        for name, pair in adapter.layers.items()
        for part, weight in zip("AB", pair, strict=True)
    }
    with atomic_folder(folder, adapter_files(folder)) as path:
        config = options_of(adapter)
        write_tensors(path / WEIGHTS, tensors, {"options": key_options(config), "base": adapter.config.get("base")})
        write_json(path / PEFT_CONFIG, content)
        digest = digest_of(
            {
                f"{name}.lora_{part}": x
                for name, pair in adapter.layers.items()
                for part, x in zip("AB", pair, strict=True)
            }
        )
        write_json(path / OUR_CONFIG, config.to_dict() | {"digest": digest})


def options_of(adapter: LoraWeights) -> AlignLoraConfig:
    """Returns the options of a model for the adapter; the rank of a layer is that of its A."""
    r = max(len(A) for A, _ in adapter.layers.values())
    names = tuple(adapter.layers)
    return AlignLoraConfig(architecture="lora", r=r, lora_alpha=r, lora_dropout=0.0, target_modules=names)


def combined(adapters: Sequence[LoraWeights], weights: Sequence[float]) -> LoraWeights:
    """Combines A and B separately: A = Σ_k w_k A_k, B = Σ_k w_k B_k (LoRAHub, 2307.13269, eq. 1).

    The rank stays r. The product has the cross terms w_j w_k B_j A_k, as in the paper.

    Args:
        adapters: adapters of one base and one rank.
        weights: one weight per adapter.

    Raises:
        ValueError: no adapters, not as many weights, or adapters that do not fit each other.
    """
    check_adapters(adapters, weights, same_rank=True)
    layers = {}
    for name in adapters[0].layers:
        pairs = [adapter.layers[name] for adapter in adapters]
        A, B = (sum(w * pair[i] for w, pair in zip(weights, pairs, strict=True)) for i in (0, 1))
        layers[name] = (torch.as_tensor(A), torch.as_tensor(B))
    return LoraWeights(layers, adapters[0].config)


def task_arithmetic(adapters: Sequence[LoraWeights], weights: Sequence[float]) -> LoraWeights:
    """Adds adapters: Δ = Σ_k λ_k B_k A_k (task arithmetic, 2212.04089; a negative λ_k forgets).

    It is exact: A = [A_1; ...; A_K], B = [λ_1 B_1, ..., λ_K B_K], so the ranks add up; `truncated` reduces the rank.

    Args:
        adapters: adapters of one base; ranks may differ.
        weights: λ_k, one weight per adapter.

    Raises:
        ValueError: no adapters, not as many weights, or adapters that do not fit each other.
    """
    check_adapters(adapters, weights)
    layers = {}
    for name in adapters[0].layers:
        pairs = [adapter.layers[name] for adapter in adapters]
        A = torch.cat([A for A, _ in pairs])
        layers[name] = (A, torch.cat([w * B for w, (_, B) in zip(weights, pairs, strict=True)], 1))
    return LoraWeights(layers, adapters[0].config)


def ties(adapters: Sequence[LoraWeights], density: float = 0.2, weight: float = 1.0) -> DenseDelta:
    """Merges adapters by TIES (2306.01708): trim, elect a sign, take the mean of the values with this sign.

        trim:   D_k = B_k A_k where |B_k A_k| is among the largest density * size of adapter k (all layers), else 0
        elect:  s = sign(Σ_k D_k)
        merge:  Δ = weight * mean over {k : sign(D_k) = s} of D_k, 0 where s = 0

    Args:
        adapters: adapters of one base; ranks may differ.
        density: the fraction of values that stay, in (0, 1]; 0.2 in the paper.
        weight: λ, the factor on the merged change.

    Raises:
        ValueError: no adapters, adapters that do not fit each other, or a density out of range.
    """
    check_adapters(adapters)
    if not 0 < density <= 1:
        raise ValueError(f"density must be in (0, 1], got {density!r}")
    thresholds = [_trim_threshold(adapter, density) for adapter in adapters]
    layers = {}
    for name in adapters[0].layers:
        products = [B @ A for A, B in (adapter.layers[name] for adapter in adapters)]
        D = torch.stack([torch.where(d.abs() >= t, d, 0.0) for d, t in zip(products, thresholds, strict=True)])
        sign = D.sum(0).sign()
        agree = (D.sign() == sign) & (sign != 0)
        layers[name] = weight * (D * agree).sum(0) / agree.sum(0).clamp_min(1)
    return DenseDelta(layers, adapters[0].config)


def _trim_threshold(adapter: LoraWeights, density: float) -> Tensor:
    """Returns the smallest magnitude that trimming keeps."""
    magnitudes = torch.cat([delta.abs().flatten() for delta in adapter.deltas().values()])
    count = max(1, round(density * len(magnitudes)))
    return magnitudes.kthvalue(len(magnitudes) - count + 1).values


def truncated(delta: LoraWeights | DenseDelta, rank: int) -> tuple[LoraWeights, dict[str, float]]:
    """Finds the nearest adapter of a rank: B A = U_r S_r V_rᵀ, the truncated SVD of each layer's change.

    A product B A is decomposed by the QR of its factors, never as [m, n].

    Args:
        delta: the result of task_arithmetic or ties.
        rank: r; the rank of a layer is at most its smaller side.

    Returns:
        The adapter, and each layer's relative error ||Δ - B A||_F / ||Δ||_F (0 for a zero Δ).

    Raises:
        ValueError: rank is no positive integer.
    """
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a positive integer, got {rank!r}")
    layers, errors = {}, {}
    for name, layer in delta.layers.items():
        U, S, Vh = _svd(layer)
        r = min(rank, *(side.shape[i] for i, side in ((0, U), (1, Vh))))
        missing = max(r - len(S), 0)  # a product of smaller rank is padded by zeros
        root = S[:r].sqrt()
        A, B = root[:, None] * Vh[:r], U[:, :r] * root
        layers[name] = (
            torch.cat([A, A.new_zeros(missing, A.shape[1])]),
            torch.cat([B, B.new_zeros(B.shape[0], missing)], 1),
        )
        errors[name] = float(S[r:].norm() / S.norm().clamp_min(torch.finfo(S.dtype).tiny))
    return LoraWeights(layers, delta.config), errors


def _svd(layer: Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(layer, Tensor):
        return torch.linalg.svd(layer, full_matrices=False)
    A, B = layer
    (Qb, Rb), (Qa, Ra) = torch.linalg.qr(B), torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(Rb @ Ra.T, full_matrices=False)
    return Qb @ U, S, Vh @ Qa.T


def merge_delta(model: nn.Module, delta: LoraWeights | DenseDelta, *, force: bool = False) -> nn.Module:
    """Adds a change to a plain model's weights, in place: W + Δ, computed in float32.

    Args:
        model: the base of the adapters.
        delta: the change.
        force: whether to accept another base model.

    Raises:
        ValueError: a layer is missing, has another shape, or cannot be merged; the model is then unchanged.
    """
    deltas = delta.deltas() if isinstance(delta, LoraWeights) else delta.layers
    if delta.config.get("base") is not None and not force:
        BaseModel.from_dict(delta.config["base"]).check(model)
    layers = {}
    for name, change in deltas.items():
        layer = layers[name] = AdaptedLinear(linear_of(model, name), nn.Identity())  # type: ignore[arg-type]
        if change.shape != (layer.out_features, layer.in_features):
            sizes = [layer.out_features, layer.in_features]
            raise ValueError(f"the change of {name} is {list(change.shape)}, but the model's weight is {sizes}")
        if reason := layer.base_unmergeable_reason():
            raise ValueError(f"{name} cannot be merged: {reason}")
        try:
            layer.merged_weight(change)  # checks all layers before the first is changed
        except ValueError as error:
            raise ValueError(f"{name} cannot be merged: {error}") from error
    for name, change in deltas.items():
        layers[name].merged_base(change)
    return model


def linear_of(model: nn.Module, name: str) -> nn.Module:
    """Returns a layer of a plain model.

    Raises:
        ValueError: there is no layer of this name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"the model has no layer {name!r}: the adapters are of another base") from error


def check_adapters(
    adapters: Sequence[LoraWeights], weights: Sequence[float] | None = None, *, same_rank: bool = False
) -> None:
    """Raises ValueError unless the adapters have one base model and the same layers, and each has a weight."""
    if not adapters:
        raise ValueError("adapters is empty: give at least one")
    if weights is not None and len(weights) != len(adapters):
        raise ValueError(f"weights {list(weights)} are {len(weights)}, but there are {len(adapters)} adapters")
    first = adapters[0]
    for i, other in enumerate(adapters[1:], 1):
        bases = [adapter.config.get("base_model_name_or_path") for adapter in (first, other)]
        if None not in bases and bases[0] != bases[1]:
            raise ValueError(f"adapters 0 and {i} are of different bases: {shown(bases[0])} and {shown(bases[1])}")
        if first.layers.keys() != other.layers.keys():
            name = min(first.layers.keys() ^ other.layers.keys())
            raise ValueError(f"adapters 0 and {i} do not adapt the same layers: {name} is in one of them only")
        for name, pair in first.layers.items():
            _check_pair(name, i, pair, other.layers[name], same_rank=same_rank)


def _check_pair(
    name: str, i: int, pair: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], *, same_rank: bool
) -> None:
    (A, B), (A2, B2) = pair, other
    if (B.shape[0], A.shape[1]) != (B2.shape[0], A2.shape[1]):
        raise ValueError(f"adapters 0 and {i} are of different bases: {name} has other sizes")
    if same_rank and len(A) != len(A2):
        raise ValueError(
            f"adapters 0 and {i} have ranks {len(A)} and {len(A2)} at {name}: A and B can be combined each by itself "
            "at one rank only; use task_arithmetic, or truncated(adapter, rank) first"
        )
