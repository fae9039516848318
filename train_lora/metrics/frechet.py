"""Frechet distance between two clouds of feature vectors (the formula behind FID)."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), computed in float64.

    first: (N, D), second: (M, D) feature vectors; N and M at least 2. The trace of the root is the
    sum of the square roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric.
    Few samples (N near D) bias the distance upwards; compare only figures of equal N.
    Source: Heusel et al., arXiv 1706.08500, eq. 6.
    """
    first, second = first.double(), second.double()
    difference = first.mean(0) - second.mean(0)
    covariance_1, covariance_2 = torch.cov(first.T), torch.cov(second.T)
    values, vectors = torch.linalg.eigh(covariance_1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ covariance_2 @ root).clamp(min=0).sqrt().sum()
    trace = covariance_1.trace() + covariance_2.trace() - 2 * cross
    return float(difference.square().sum() + trace)
