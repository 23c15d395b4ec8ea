"""Cosines of all pairs of some vectors."""

import torch
from torch import Tensor


def cosines(vectors: Tensor) -> Tensor:
    """Computes the cosine of every pair of rows, [K, K] for [K, d]; NaN where a row is zero."""
    vectors = vectors.detach().to(torch.promote_types(vectors.dtype, torch.float32))
    units = vectors / vectors.norm(dim=1, keepdim=True)
    return units @ units.T


def pairs(matrix: Tensor) -> Tensor:
    """Returns the entries of the pairs i < j of a matrix [K, K] that are numbers, in the order of the rows; [pairs]."""
    i, j = torch.triu_indices(len(matrix), len(matrix), offset=1)
    upper = matrix[i, j]
    return upper[~upper.isnan()]
