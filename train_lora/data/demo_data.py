"""The demo's captions and drawn scenes as a source like any other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from dmd2_core import derived_seed

from .samples import Sample
from .sizes import Size

if TYPE_CHECKING:
    from .settings import DataConfig

DEMO = "demo"
NUM_CAPTIONS, NUM_IMAGES = 2048, 768


def check_demo_size(settings: DataConfig, sizes: tuple[Size, ...]) -> None:
    """ValueError unless drawn scenes fit the settings."""
    from ..demo.scenes import IMAGE_PX

    if settings.real_images != DEMO:
        return
    if settings.resolution_px != IMAGE_PX:
        raise ValueError(
            f"data.resolution_px is {settings.resolution_px}, but the demo's real images are "
            f"{IMAGE_PX} px wide; set it to {IMAGE_PX}, or name a folder in data.real_images."
        )
    if Size.square(IMAGE_PX) not in sizes:
        raise ValueError(
            f"data.sizes leaves out {Size.square(IMAGE_PX)}, the size of the demo's real images; "
            "add it, or name a folder in data.real_images."
        )


def demo_captions(count: int = NUM_CAPTIONS) -> list[str]:
    from ..demo import scenes

    generator = torch.Generator().manual_seed(derived_seed(0))
    return [scene.caption for scene in scenes.random_scenes(count, generator)]


def demo_samples(count: int = NUM_IMAGES) -> Iterator[Sample]:
    """Scenes as pixels, (3, 128, 128) float32 in [-1, 1]; drawn 256 at a time."""
    from ..demo import scenes

    generator = torch.Generator().manual_seed(derived_seed(1))
    drawn = scenes.random_scenes(count, generator)
    for first in range(0, count, 256):
        images = scenes.draw(drawn[first : first + 256], generator)
        for number, image in enumerate(images, first):
            caption = drawn[number].caption
            yield Sample(
                name=f"demo scene {number}",
                stamp=lambda caption=caption: caption,
                load=lambda image=image, caption=caption: (image, caption),
            )
