"""Tensors to pictures: labelled grids, thumbnails."""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

GAP_PX, LABEL_PX = 4, 22
LINE_PX, CHARACTER_PX = 13, 6  # of the captions above the columns


def to_picture(image: Tensor) -> Image:
    """One image (3, H, W) in [-1, 1] as an RGB picture."""
    from PIL import Image

    pixels = ((image.float().clamp(-1, 1) + 1) * 127.5).round().byte()
    channels_last = pixels.permute(1, 2, 0).contiguous().cpu()
    size = (image.shape[2], image.shape[1])
    return Image.frombytes("RGB", size, channels_last.numpy().tobytes())


def jpeg_data_url(image: Tensor, largest_px: int) -> str:
    """One image (3, H, W) in [-1, 1], at most `largest_px` wide and high, as a data URL."""
    picture = to_picture(image)
    picture.thumbnail((largest_px, largest_px))
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def labelled_grid(rows: Sequence[tuple[str, Tensor]], captions: Sequence[str] = ()) -> Image:
    """Rows of images (N, 3, H, W) in [-1, 1], one under the other, each below its label.

    captions: what each of the N columns shows, written above it; none or N of them.
    """
    from PIL import Image, ImageDraw, ImageFont

    count, _, height, width = rows[0][1].shape
    column_px, row_px = width + GAP_PX, LABEL_PX + height + GAP_PX
    header = [textwrap.wrap(caption, width // CHARACTER_PX) for caption in captions]
    header_px = LINE_PX * max(map(len, header), default=0)
    small, font = ImageFont.load_default(size=11), ImageFont.load_default(size=13)
    label_px = round(max(font.getlength(label) for label, _ in rows))
    width_px = max(count * column_px, label_px + GAP_PX) + GAP_PX
    grid = Image.new("RGB", (width_px, header_px + len(rows) * row_px), "white")
    draw = ImageDraw.Draw(grid)
    for i, lines in enumerate(header):
        for k, line in enumerate(lines):
            draw.text((GAP_PX + i * column_px, k * LINE_PX), line, fill="black", font=small)
    for r, (label, images) in enumerate(rows):
        top = header_px + r * row_px
        draw.text((GAP_PX, top + 3), label, fill="black", font=font)
        for i, image in enumerate(images):
            grid.paste(to_picture(image), (GAP_PX + i * column_px, top + LABEL_PX))
    return grid
