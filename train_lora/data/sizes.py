"""Aspect-ratio buckets: the sizes that pictures are sorted into (standard library only)."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, order=True, slots=True)
class Size:
    """A picture's width and height in pixels, written "832x1216"."""

    width_px: int
    height_px: int

    def __str__(self) -> str:
        return f"{self.width_px}x{self.height_px}"

    @property
    def area_px(self) -> int:
        return self.width_px * self.height_px

    @property
    def aspect(self) -> float:
        return self.width_px / self.height_px

    @classmethod
    def square(cls, side_px: int) -> Size:
        return cls(side_px, side_px)

    @classmethod
    def parse(cls, text: str) -> Size:
        """The inverse of `str`; ValueError for anything else."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if match is None:
            raise ValueError(f'{text!r} is no size: write WIDTHxHEIGHT, such as "832x1216"')
        return cls(int(match[1]), int(match[2]))


# SDXL's own sizes (arXiv 2307.01952, appendix I), shorter side first; the other half is turned.
_SDXL_PX = (
    *((512, 2048), (512, 1984), (512, 1920), (512, 1856), (576, 1792), (576, 1728), (576, 1664)),
    *((640, 1600), (640, 1536), (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280)),
    *((832, 1216), (832, 1152), (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024)),
)
_SDXL_SIDE_PX = 1024


def grid_px(resolution_px: int) -> int:
    """What a side must be a multiple of: 64 as in SDXL's list, 32 for small models.

    32 px are one cell of the middle block, 64 would leave a model of 128 px no shapes.
    """
    return 64 if resolution_px >= 512 else 32


def sdxl_sizes(resolution_px: int) -> tuple[Size, ...]:
    """SDXL's list for a model of this resolution, both orientations, sorted; exact at 1024 px.

    No size has more pixels than the square, so the square's memory is enough for all.
    """
    grid, largest = grid_px(resolution_px), resolution_px**2
    found = set()
    for short, long in _SDXL_PX:
        width = max(grid, _nearest(short * resolution_px / _SDXL_SIDE_PX, grid))
        height = _nearest(long * resolution_px / _SDXL_SIDE_PX, grid)
        height = min(height, largest // width // grid * grid)
        found |= {Size(width, height), Size(height, width)}
    return tuple(sorted(found))


def _nearest(value: float, grid: int) -> int:
    return int(value / grid + 0.5) * grid


def nearest_size(width_px: int, height_px: int, sizes: Sequence[Size]) -> Size:
    """The size whose aspect ratio is closest to the picture's; of equals the larger."""
    aspect = math.log(width_px / height_px)
    return min(sizes, key=lambda size: (abs(math.log(size.aspect) - aspect), -size.area_px, size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Crop:
    """How a picture fills its size: scaled to `width_px` x `height_px`, then cut at (left, top)."""

    width_px: int
    height_px: int
    left_px: int
    top_px: int
    scale: float


def fill(width_px: int, height_px: int, size: Size) -> Crop:
    """Scale a picture until it covers `size` on both sides, and cut the middle out."""
    scale = max(size.width_px / width_px, size.height_px / height_px)
    width = max(size.width_px, round(width_px * scale))
    height = max(size.height_px, round(height_px * scale))
    return Crop(
        width_px=width,
        height_px=height,
        left_px=(width - size.width_px) // 2,
        top_px=(height - size.height_px) // 2,
        scale=scale,
    )
