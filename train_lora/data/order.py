"""Which samples a training step sees: a function of seed and position, so resume is exact."""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2_core import derived_generator


def shuffled_indices(num_samples: int, first: int, count: int, seed: int) -> Tensor:
    """Places `first` .. `first + count - 1` of an endless shuffled order: (count,) int64.

    Every pass through the data is a fresh permutation drawn from (seed, pass).
    """
    picked, place = [], first
    while place < first + count:
        epoch, offset = divmod(place, num_samples)
        order = torch.randperm(num_samples, generator=derived_generator(seed, epoch))
        piece = order[offset : offset + first + count - place]
        picked.append(piece)
        place += len(piece)
    return torch.cat(picked)
