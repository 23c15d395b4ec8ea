"""Agreement of heads or tasks by band of singular values: where in the spectrum of an update knowledge is shared.

mtLoRA (2603.01526, Figure 1B) finds that what tasks share lies in the largest singular values. Its released code
compares the k-th singular vector of one head with the k-th of the other, times both singular values; singular vectors
of nearly equal values turn freely into each other, so here whole bands are compared, free of the values, with the
share of the spectrum beside it.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from align_ext.adapters.capture import adapters_of
from align_ext.diagnostics.conflict import recorded_gradients
from align_ext.diagnostics.cosines import cosines, pairs
from align_ext.diagnostics.heads import changes
from align_ext.diagnostics.record import Recording

_MOST = 4  # bands


@dataclass(frozen=True)
class Bands:
    """Bands of singular values, the largest first.

    Attributes:
        names: the numbers of the singular values of each band ("1-2", "3-4", ...), at most 4 bands.
        alignment: [bands], the mean over layers and pairs.
        energy: [bands], the share of Σ sigma² in the band, the mean over layers and heads.
        chance: [bands], the alignment of random directions.
    """

    names: tuple[str, ...]
    alignment: Tensor
    energy: Tensor
    chance: Tensor


def head_bands(model: nn.Module, start: Mapping[str, Tensor] | None = None) -> Bands:
    """Computes how far heads (for multi_adapter and lora_moe: tasks, experts) write into the same outputs, by band.

        Delta_i = B_i A_i = U_i Sigma_i V_iᵀ,   U_ib [m, w]: the columns of U_i of band b
        alignment_b = mean over layers and pairs i < j of |U_ibᵀ U_jb|_F² / w

    This is the mean squared cosine of the angles between the two subspaces: 1 if they are the same, w / m for random
    ones. With start the change of the heads counts: Delta_i = (B_i - B_i(0)) A_i. Directions whose singular value is
    zero to float32's precision do not count.

    Args:
        model: a model whose adapters have several heads or tasks.
        start: what copy_heads returned before training.

    Returns:
        The bands in which some layer has an update; none before training.

    Raises:
        ValueError: no layer has several heads, or start is of other layers.
    """
    adapters = {name: a for name, a in adapters_of(model).items() if a.lora_B.dim() == 3 and len(a.lora_B) > 1}
    if not adapters:
        raise ValueError("no layer has several heads: for one adapter use gradient_bands(model, recording)")
    heads = changes({name: adapter.lora_B for name, adapter in adapters.items()}, start)
    spectra = {name: _Spectrum.of(B, adapters[name].A) for name, B in heads.items()}
    edges = _edges(spectra.values())
    found = []
    for spectrum in spectra.values():
        for a, b in edges:
            U = spectrum.U[:, :, a:b]
            overlap = torch.einsum("imr,jms->ijrs", U, U).square().sum((2, 3)) / (b - a)
            there = spectrum.has(a, b)
            overlap[~(there[:, None] & there)] = torch.nan
            found.append(_Found((a, b), pairs(overlap), spectrum.share(a, b), (b - a) / U.shape[1]))
    return _bands(edges, found)


def gradient_bands(model: nn.Module, recording: Recording) -> Bands:
    """Computes how far the tasks' gradients agree in each band of the one update that they share.

        Delta = B A = U Sigma Vᵀ,   p_kb = (U_bᵀ dL_k/dB, dL_k/dA V_b)
        alignment_b = mean over layers and pairs of tasks i < j of cos(p_ib, p_jb)

    In a band with positive values the tasks want the same change of it, with negative ones opposite changes; random
    gradients have 0. Directions whose singular value is zero to float32's precision do not count.

    Args:
        model: a model whose adapters have one head (lora, align_lora); others are left out.
        recording: what record_adapters(model, batches, gradients=True) returned.

    Returns:
        The bands in which some layer has an update; none before training, or for a single task.

    Raises:
        ValueError: the recording has no gradients.
    """
    gradients = recorded_gradients(recording)
    spectra = {}
    for name, adapter in adapters_of(model).items():
        if adapter.lora_B.dim() == 2 and {"lora_A", "lora_B"} <= gradients.get(name, {}).keys():
            A, B = zip(*adapter.delta_factors(), strict=True)  # with the offset of the start
            spectra[name] = _Spectrum.of(torch.cat(B, 1), torch.cat(A))
    edges = _edges(spectra.values())
    found = []
    for name, spectrum in spectra.items():
        dA, dB = gradients[name]["lora_A"].double(), gradients[name]["lora_B"].double()
        for a, b in edges:
            U, V = spectrum.U[:, a:b], spectrum.V[:, a:b]
            agreement = pairs(cosines(torch.cat([(U.T @ dB).flatten(1), (dA @ V).flatten(1)], 1)))
            agreement = agreement if spectrum.has(a, b) else agreement[:0]
            found.append(_Found((a, b), agreement, spectrum.share(a, b), 0.0))
    return _bands(edges, found)


class _Spectrum(NamedTuple):
    """The spectrum of B A [..., m, n] in float64: U [..., m, k], S [..., k], V [..., n, k].

    Attributes:
        floor: [...], what float32's rounding of B and A can make of a singular value that is 0.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    floor: Tensor

    @classmethod
    def of(cls, B: Tensor, A: Tensor) -> "_Spectrum":
        """Computes them of the factors: A = Rᵀ Qᵀ, so that B A = (B Rᵀ) Qᵀ takes the SVD of an m x r matrix alone."""
        B, A = B.detach().cpu().double(), A.detach().cpu().double()
        Q, R = torch.linalg.qr(A.mT)
        U, S, W = torch.linalg.svd(B @ R.mT, full_matrices=False)
        norms = torch.linalg.matrix_norm(B) * torch.linalg.matrix_norm(A)
        return cls(U, S, Q @ W.mT, torch.finfo(torch.float32).eps * norms)

    def has(self, a: int, b: int) -> Tensor:
        """Returns whether all singular values of a band are there, bool [...]."""
        if b > self.S.shape[-1]:
            return torch.zeros_like(self.floor, dtype=torch.bool)
        return (self.S[..., a:b] > self.floor[..., None]).all(-1)

    def share(self, a: int, b: int) -> Tensor:
        """Returns the band's part of the sum of squares, [...]; NaN where the sum is 0."""
        return self.S[..., a:b].square().sum(-1) / self.S.square().sum(-1)


class _Found(NamedTuple):
    """What one layer has in one band: the agreement of pairs [pairs], the energy [...], and the chance."""

    band: tuple[int, int]
    agreement: Tensor
    energy: Tensor
    chance: float


def _edges(spectra: Iterable[_Spectrum]) -> list[tuple[int, int]]:
    """Returns the first and last (exclusive) number of each band of equally many singular values, but for the last."""
    rank = max((spectrum.S.shape[-1] for spectrum in spectra), default=0)
    width = max(math.ceil(rank / _MOST), 1)
    return [(a, min(a + width, rank)) for a in range(0, rank, width)]


def _bands(edges: list[tuple[int, int]], found: list[_Found]) -> Bands:
    names, columns = [], []
    for a, b in edges:
        parts = [part for part in found if part.band == (a, b) and len(part.agreement)]
        if parts:
            names.append(f"{a + 1}-{b}" if b > a + 1 else str(b))
            energy = torch.cat([part.energy.flatten() for part in parts]).nanmean()
            chance = torch.tensor([part.chance for part in parts], dtype=torch.float64).mean()
            columns.append(torch.stack([torch.cat([part.agreement for part in parts]).mean(), energy, chance]))
    return Bands(tuple(names), *(torch.stack(columns, 1) if columns else torch.empty(3, 0)))
