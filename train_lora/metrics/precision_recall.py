"""Precision and recall of a cloud of feature vectors: fidelity and coverage apart."""

from __future__ import annotations

import torch
from torch import Tensor, cdist

NEIGHBOURS = 3
ROWS = 2048
"""Rows of the distance matrix that are held at once."""


def precision_recall(made: Tensor, real: Tensor) -> tuple[float, float]:
    """Share of `made` that lies among the real ones, and share of `real` that the made ones reach.

    made: (N, D), real: (M, D), each more than `NEIGHBOURS`. A vector lies among others if it is no
    farther from one of them than that one is from its third neighbour. Few vectors have distant
    neighbours and are generous: compare figures of equal N and M.
    Source: Kynkaanniemi et al., arXiv 1904.06991, eq. 1 and 2.
    """
    made, real = made.double(), real.double()
    return _share_among(made, real), _share_among(real, made)


def _share_among(vectors: Tensor, others: Tensor) -> float:
    # The smallest of a row is the distance to itself, 0.
    radius = torch.cat(
        [cdist(rows, others).kthvalue(NEIGHBOURS + 1).values for rows in others.split(ROWS)]
    )
    inside = [(cdist(rows, others) <= radius).any(1) for rows in vectors.split(ROWS)]
    return float(torch.cat(inside).double().mean())
