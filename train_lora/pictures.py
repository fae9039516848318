"""Tensors to pictures: labelled grids, thumbnails."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

GAP_PX, LABEL_PX = 4, 22


def to_picture(image: Tensor) -> Image:
    """One image (3, H, W) in [-1, 1] as an RGB picture."""
    from PIL import Image

    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    channels_last = pixels.permute(1, 2, 0).contiguous().cpu()
    return Image.frombytes(
        "RGB", (image.shape[2], image.shape[1]), bytes(channels_last.flatten().tolist())
    )


def jpeg_data_url(image: Tensor, largest_px: int) -> str:
    """One image (3, H, W) in [-1, 1], at most `largest_px` wide and high, as a data URL."""
    picture = to_picture(image)
    picture.thumbnail((largest_px, largest_px))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def labelled_grid(rows: Sequence[tuple[str, Tensor]]) -> Image:
    """Rows of images (N, 3, H, W) in [-1, 1], one under the other, each below its label."""
    from PIL import Image, ImageDraw, ImageFont

    count, _, height, width = rows[0][1].shape
    row_px = LABEL_PX + height + GAP_PX
    grid = Image.new("RGB", (count * (width + GAP_PX) + GAP_PX, len(rows) * row_px), "white")
    draw = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=13)
    for r, (label, images) in enumerate(rows):
        draw.text((GAP_PX, r * row_px + 3), label, fill="black", font=font)
        for i, image in enumerate(images):
            place = (GAP_PX + i * (width + GAP_PX), r * row_px + LABEL_PX)
            grid.paste(to_picture(image), place)
    return grid
