"""Random numbers in training: each sample draws from a generator of its own.

It is seeded by (seed, iteration, place in the global batch), so that how the global batch is split
over processes and micro-batches changes no number, and no random state needs saving.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dmd2_core import derived_generator

Draws = Sequence[torch.Generator]
"""One CPU generator for each sample of a batch, in its order."""


def sample_draws(*key: int, first: int, count: int) -> list[torch.Generator]:
    """Generators of the samples `first` .. `first + count - 1` of the global batch of `key`."""
    return [derived_generator(*key, first + row) for row in range(count)]


def randn_like(like: Tensor, draws: Draws) -> Tensor:
    """Unit Gaussian noise like `like` (B, ...), drawn on the CPU so that every device trains alike.

    Row i is the next draw of `draws[i]`; a generator may serve several rows.
    """
    assert len(like) == len(draws)
    rows = [torch.randn(like.shape[1:], generator=generator) for generator in draws]
    return torch.stack(rows).to(like.device, like.dtype)


def random_timesteps(low: int, high: int, like: Tensor, draws: Draws) -> Tensor:
    """One t ~ U{low..high} per sample of `like`: (B,) int64."""
    assert len(like) == len(draws)
    rows = [torch.randint(low, high + 1, (), generator=generator) for generator in draws]
    return torch.stack(rows).to(like.device)
