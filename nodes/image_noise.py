"""Which noise each image of a batch gets: by one seed and its place in the batch, or by a seed of
its own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import comfy.sample
import torch
from torch import Tensor

from ..dmd2_core import SeededNoise

MAX_SEED = 2**64 - 1


def parse_seeds(text: str) -> tuple[int, ...]:
    """The seeds in "11, 12, 40" (commas, semicolons or spaces); () for an empty text."""
    words = [word for word in re.split(r"[\s,;]+", text) if word]
    for word in words:
        if not re.fullmatch(r"[0-9]{1,20}", word) or int(word) > MAX_SEED:
            raise ValueError(
                f"seeds has {word!r}, which is not a whole number from 0 to 2^64 - 1: write one "
                "per image, such as 11, 12, 40, or leave it empty"
            )
    return tuple(map(int, words))


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageNoise:
    """The noise of one sampling run; it is called as the sampler calls it, for the fresh noise."""

    seed: int
    """Of the batch."""
    batch_index: Sequence[int] | None = None
    """Each image's place in the batch that it was taken from; None: 0, 1, ..."""
    listed: tuple[int, ...] = ()
    """Instead a seed for each image, which comes out as it does alone with that seed."""

    def first(self, samples: Tensor) -> Tensor:
        """What sampling starts from, drawn as ComfyUI's own nodes draw it: `samples`' shape.

        ValueError unless there is a seed for each image, or none at all.
        """
        if not self.listed:
            return comfy.sample.prepare_noise(samples, self.seed, self.batch_index)
        if len(self.listed) != len(samples):
            raise ValueError(
                f"seeds lists {len(self.listed)}, but the latent holds {len(samples)} "
                f"image{'s' * (len(samples) != 1)}: list one seed per image, set the latent's "
                f"batch size to {len(self.listed)}, or leave seeds empty"
            )
        images = zip(samples.split(1), self.listed, strict=True)
        return torch.cat([comfy.sample.prepare_noise(image, seed) for image, seed in images])

    def __call__(self, step: int, like: Tensor) -> Tensor:
        """The fresh noise that leads to `step`: `like`'s shape (B, ...), dtype and device."""
        if self.listed:
            images = [(seed, 0) for seed in self.listed]
        else:
            places = range(len(like)) if self.batch_index is None else self.batch_index
            images = [(self.seed, place) for place in places]
        rows = [SeededNoise(seed, place).draw(step, like[:1].shape) for seed, place in images]
        return torch.cat(rows).to(like.device, like.dtype)
