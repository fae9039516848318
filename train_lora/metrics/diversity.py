"""How different the pictures of one prompt are from each other."""

from __future__ import annotations

from torch import Tensor, cdist


def diversity(features: Tensor) -> float:
    """Mean pairwise distance between the feature vectors of pictures that share a prompt.

    features: (P, S, D): P prompts, S >= 2 seeds each. Averaged over pairs, then over prompts.
    """
    num_seeds = features.shape[1]
    distances = cdist(features.double(), features.double())
    return float(distances.sum((1, 2)).mean() / (num_seeds * (num_seeds - 1)))
