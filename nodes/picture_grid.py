"""Pictures in rows and columns with their texts, as one image: pure Pillow and torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Windows, macOS, Linux: those with Chinese and Japanese first.
SYSTEM_FONTS = ("msyh.ttc", "Arial Unicode.ttf", "NotoSansCJK-Regular.ttc", "DejaVuSans.ttf")
BACKGROUND, TEXT, PALE_TEXT = "white", "black", "#555555"


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One system: its name, a line about it, and its picture of each prompt."""

    label: str
    detail: str
    pictures: Sequence[Tensor]
    """Each (H, W, 3) in [0, 1], all of one size."""


def labelled_grid(columns: Sequence[Column], captions: Sequence[str]) -> Tensor:
    """Columns side by side below their labels, a row for each caption, which is written above it.

    Texts wrap where they are too long. Returns (1, height, width, 3) float32 in [0, 1].
    """
    height, width, _ = columns[0].pictures[0].shape
    text_px = min(max(width // 28, 12), 40)
    gap = max(text_px // 3, 4)
    texts = [*captions, *(text for column in columns for text in (column.label, column.detail))]
    font = font_for(texts, text_px)
    small = font_for(texts, round(0.8 * text_px))
    total = gap + len(columns) * (width + gap)
    heads = [
        [(line, font, TEXT) for line in wrapped(column.label, font, width)]
        + [(line, small, PALE_TEXT) for line in wrapped(column.detail, small, width)]
        for column in columns
    ]
    above = [wrapped(caption, font, total - 2 * gap) for caption in captions]
    line = round(1.3 * text_px)
    head_px = gap + line * max(map(len, heads))
    row_px = [line * len(lines) + gap + height + gap for lines in above]
    grid = Image.new("RGB", (total, head_px + sum(row_px) + gap), BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for index, head in enumerate(heads):
        for row, (text, face, colour) in enumerate(head):
            place = (gap + index * (width + gap), gap + row * line)
            draw.text(place, text, fill=colour, font=face)
    top = head_px
    for index, lines in enumerate(above):
        for text in lines:
            draw.text((gap, top), text, fill=TEXT, font=font)
            top += line
        for place, column in enumerate(columns):
            grid.paste(_picture(column.pictures[index]), (gap + place * (width + gap), top + gap))
        top += gap + height + gap
    pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
    return pixels.reshape(1, grid.height, grid.width, 3) / 255


def font_for(texts: Sequence[str], size_px: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, which has ASCII only, or for other letters one of the system's."""
    if not all(text.isascii() for text in texts):
        for name in SYSTEM_FONTS:
            try:
                return ImageFont.truetype(name, size_px)
            except OSError:
                continue  # not on this system
    return ImageFont.load_default(size=size_px)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> list[str]:
    """`text` in lines no wider than `width_px`; a word that is wider alone is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width_px:
            lines[-1] = longer
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width_px:
                lines.append("")
            lines[-1] += letter
    return [line for line in lines if line]


def _picture(image: Tensor) -> Image.Image:
    """(H, W, 3) in [0, 1] as an RGB picture, rounded down as ComfyUI's Save Image does."""
    pixels = (image.detach().float().cpu().clamp(0, 1) * 255).to(torch.uint8)
    return Image.fromarray(pixels.contiguous().numpy())
