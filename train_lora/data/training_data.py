"""What a run trains on, encoded once and held in memory: prompts, real latents, their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dmd2_core import derived_seed

from ..config import Config
from ..distill import Batch, RealImages
from ..models.components import Components
from ..models.text import Condition, encode_prompts
from ..sampling import encode_images
from .images import read_captioned_images
from .order import shuffled_indices
from .prompts import read_prompts

DEMO = "demo"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """Conditions and latents of all samples, on the training device."""

    captions: Sequence[str]
    """The training prompts; `condition` has a row for each."""
    condition: Condition
    real: RealImages | None = None
    """Every real image; None where the configuration needs none."""

    def batch(self, *, first: int, size: int, seed: int) -> Batch:
        """Samples `first` .. `first + size - 1` of the shuffled order; prompts and images apart."""
        prompts = shuffled_indices(len(self.condition), first, size, derived_seed(seed, 0))
        condition = self.condition[prompts]
        if self.real is None:
            return Batch(condition=condition)
        latents = self.real.latents
        images = shuffled_indices(len(latents), first, size, derived_seed(seed, 1))
        real = RealImages(
            latents=latents[images.to(latents.device)], condition=self.real.condition[images]
        )
        return Batch(condition=condition, real=real)


def encode_captions(
    components: Components, captions: Sequence[str], resolution_px: int, chunk: int = 128
) -> Condition:
    """`encode_prompts` in chunks; each distinct caption is encoded once."""
    distinct = list(dict.fromkeys(captions))
    encoded = Condition.cat(
        [
            encode_prompts(components, distinct[i : i + chunk], resolution_px, resolution_px)
            for i in range(0, len(distinct), chunk)
        ]
    )
    row = {caption: index for index, caption in enumerate(distinct)}
    return encoded[torch.tensor([row[caption] for caption in captions])]


def load_training_data(config: Config, components: Components) -> TrainingData:
    """Read, check and encode what `config.data` names; ValueError for what cannot be used."""
    settings = config.data
    _check_demo_size(config)
    captions = _demo_captions() if settings.prompts == DEMO else read_prompts(settings.prompts)
    condition = encode_captions(components, captions, settings.resolution_px)
    if settings.real_images is None or not config.needs_real_images:
        return TrainingData(captions=captions, condition=condition)
    if settings.real_images == DEMO:
        images, image_captions = _demo_images()
    else:
        images, image_captions = read_captioned_images(
            Path(settings.real_images), settings.resolution_px
        )
    device = condition.hidden.device
    latents = torch.cat([encode_images(components, chunk.to(device)) for chunk in images.split(64)])
    real_condition = encode_captions(components, image_captions, settings.resolution_px)
    return TrainingData(
        captions=captions,
        condition=condition,
        real=RealImages(latents=latents, condition=real_condition),
    )


def _check_demo_size(config: Config) -> None:
    from ..demo.scenes import IMAGE_PX

    settings = config.data
    if settings.real_images == DEMO and settings.resolution_px != IMAGE_PX:
        raise ValueError(
            f"data.resolution_px is {settings.resolution_px}, but the demo's real images are "
            f"{IMAGE_PX} px wide; set it to {IMAGE_PX}, or name a folder in data.real_images."
        )


def _demo_captions(count: int = 2048) -> list[str]:
    from ..demo import scenes

    generator = torch.Generator().manual_seed(derived_seed(0))
    return [scene.caption for scene in scenes.random_scenes(count, generator)]


def _demo_images(count: int = 768) -> tuple[Tensor, list[str]]:
    from ..demo import scenes

    generator = torch.Generator().manual_seed(derived_seed(1))
    drawn = scenes.random_scenes(count, generator)
    images = torch.cat([scenes.draw(drawn[i : i + 256], generator) for i in range(0, count, 256)])
    return images, [scene.caption for scene in drawn]
