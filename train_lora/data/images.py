"""Picture files to pixels that fill a bucket."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .samples import BadSampleError
from .sizes import Size, fill, nearest_size

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
FORMATS = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """One picture at the size of its bucket."""

    values: Tensor
    """(3, H, W): uint8, or float32 in [-1, 1]."""
    size: Size
    ids: tuple[int, ...]
    """SDXL's size ids: original height and width, crop top and left, the bucket's two sides."""

    def scaled(self) -> Tensor:
        """(3, H, W) float32 in [-1, 1]."""
        if self.values.is_floating_point():
            return self.values
        return self.values.float() / 127.5 - 1


def open_picture(content: bytes | Path, name: str) -> Image:
    """Decoded, turned as its EXIF data say, RGB; BadSampleError if it cannot be read."""
    from PIL import Image, ImageOps

    try:
        file = io.BytesIO(content) if isinstance(content, bytes) else content
        with Image.open(file, formats=FORMATS) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except Exception as error:  # decoders raise nearly anything on damaged files
        raise BadSampleError(
            "unreadable", f"{name} cannot be read as a picture; replace or remove it."
        ) from error


def fit(
    picture: Image | Tensor, sizes: Sequence[Size], name: str, min_size_px: int | None
) -> Pixels:
    """The picture in the bucket of the nearest aspect ratio, its middle if it has to be cut.

    BadSampleError "too small" for a shorter side below `min_size_px`; where that is None, for a
    picture that would have to be enlarged. Pixels that are a tensor already have a bucket's size.
    """
    from PIL import Image

    if isinstance(picture, Tensor):
        size = Size(picture.shape[2], picture.shape[1])
        assert size in sizes
        return Pixels(values=picture, size=size, ids=bucket_ids(size))
    size = nearest_size(*picture.size, sizes)
    crop = fill(*picture.size, size)
    if min_size_px is None and crop.scale > 1:
        raise BadSampleError(
            "too small",
            f"{name} is {picture.width} x {picture.height} px, smaller than its bucket {size}; "
            "remove it, lower data.resolution_px, or set data.min_size_px to enlarge pictures.",
        )
    if min_size_px is not None and min(picture.size) < min_size_px:
        raise BadSampleError(
            "too small",
            f"{name} is {picture.width} x {picture.height} px, below data.min_size_px "
            f"{min_size_px}; remove it, or lower data.min_size_px.",
        )
    if picture.size != (crop.width_px, crop.height_px):
        resized = picture.resize((crop.width_px, crop.height_px), Image.Resampling.LANCZOS)
    else:
        resized = picture
    right, bottom = crop.left_px + size.width_px, crop.top_px + size.height_px
    cut = resized.crop((crop.left_px, crop.top_px, right, bottom))
    values = torch.frombuffer(bytearray(cut.tobytes()), dtype=torch.uint8)
    values = values.view(size.height_px, size.width_px, 3).permute(2, 0, 1)
    original = (picture.height, picture.width, crop.top_px, crop.left_px)
    return Pixels(values=values, size=size, ids=(*original, size.height_px, size.width_px))


def bucket_ids(size: Size) -> tuple[int, ...]:
    """The size ids of an uncropped picture of exactly this size, as at inference."""
    return (size.height_px, size.width_px, 0, 0, size.height_px, size.width_px)
