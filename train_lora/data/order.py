"""Which samples a training step sees: a function of seed and position, so resume is exact.

Samples are counted over all ranks, micro-batches and steps; a checkpoint needs no more than the
step. One process with a batch of 4 and two with batches of 2 read the same samples.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dmd2_core import derived_generator, derived_seed

BLOCK_STEPS = 1024
PROMPT_STREAM, IMAGE_STREAM, BUCKET_STREAM, PAIR_STREAM = range(4)


def shuffled_indices(num_samples: int, first: int, count: int, seed: int) -> Tensor:
    """Places `first` .. `first + count - 1` of an endless shuffled order: (count,) int64.

    Every pass through the data is a fresh permutation drawn from (seed, pass).
    """
    picked, place = [], first
    while place < first + count:
        epoch, offset = divmod(place, num_samples)
        piece = _permutation(num_samples, seed, epoch)[offset : offset + first + count - place]
        picked.append(piece)
        place += len(piece)
    return torch.cat(picked)


@functools.lru_cache(maxsize=64)  # one for each bucket and for the prompts
def _permutation(num_samples: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(num_samples, generator=derived_generator(seed, epoch))


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRows:
    """What one forward pass reads: a bucket, and rows of the prompts and of its images."""

    bucket: int
    prompts: Tensor
    """(B,) int64, rows of the prompts."""
    images: Tensor | None
    """(B,) int64, rows of the bucket's images; None without real images."""


@dataclass(frozen=True, kw_only=True)
class SampleOrder:
    """The endless order of all samples; `rows` is a pure function of its arguments.

    All ranks and micro-batches of a step share one bucket, drawn with the probability of its share
    of the images. Within a bucket, as among the prompts, each pass is a fresh permutation.
    """

    num_prompts: int
    bucket_weights: Sequence[int]
    """Images in each bucket; without images any shares."""
    has_images: bool
    samples_per_step: int
    """Ranks x micro-batches x batch size."""

    def rows(self, first: int, count: int, seed: int) -> BatchRows:
        """The samples `first` .. `first + count - 1` of the whole run, all of one step."""
        step, offset = divmod(first, self.samples_per_step)
        assert offset + count <= self.samples_per_step, "a batch lies within one step"
        bucket, visits = self.bucket_at(step, seed)
        images = None
        if self.has_images:
            place = visits * self.samples_per_step + offset
            num_images = self.bucket_weights[bucket]
            images = shuffled_indices(num_images, place, count, derived_seed(seed, IMAGE_STREAM))
        prompts = shuffled_indices(
            self.num_prompts, first, count, derived_seed(seed, PROMPT_STREAM)
        )
        return BatchRows(bucket=bucket, prompts=prompts, images=images)

    def bucket_at(self, step: int, seed: int) -> tuple[int, int]:
        """The step's bucket, and how many steps before it had the same one."""
        weights, stream = tuple(self.bucket_weights), derived_seed(seed, BUCKET_STREAM)
        block, offset = divmod(step, BLOCK_STEPS)
        draws = _bucket_draws(weights, stream, block)
        bucket = int(draws[offset])
        before = sum(
            int(_bucket_counts(weights, stream, earlier)[bucket]) for earlier in range(block)
        )
        return bucket, before + int((draws[:offset] == bucket).sum())


@functools.lru_cache(maxsize=8)
def _bucket_draws(weights: tuple[int, ...], seed: int, block: int) -> Tensor:
    """The buckets of `BLOCK_STEPS` steps: int64, with replacement."""
    shares = torch.tensor(weights, dtype=torch.float64)
    return torch.multinomial(
        shares, BLOCK_STEPS, replacement=True, generator=derived_generator(seed, block)
    )


@functools.lru_cache(maxsize=4096)
def _bucket_counts(weights: tuple[int, ...], seed: int, block: int) -> Tensor:
    return torch.bincount(_bucket_draws(weights, seed, block), minlength=len(weights))
