"""A folder of pictures with same-name .txt captions (the kohya habit)."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def read_captioned_images(folder: Path, resolution_px: int) -> tuple[Tensor, list[str]]:
    """All pictures of `folder`: (N, 3, R, R) float32 in [-1, 1], and their captions.

    Each is scaled so that its shorter side has `resolution_px` pixels, then cropped in the middle.
    Raises ValueError for an empty folder, a picture without caption, or one that cannot be read.
    """
    if not folder.is_dir():
        raise ValueError(f"data.real_images is {str(folder)!r}, which is no folder; name one.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(
            f"data.real_images {str(folder)!r} has no picture ({', '.join(SUFFIXES)}); "
            "put captioned pictures there, or set gan.enabled to false."
        )
    images = torch.stack([_read_image(path, resolution_px) for path in files])
    return images, [_read_caption(path) for path in files]


def _read_caption(image: Path) -> str:
    path = image.with_suffix(".txt")
    caption = path.read_text(encoding="utf-8").strip() if path.is_file() else ""
    if not caption:
        raise ValueError(f"{image} has no caption; write one into {path}, or remove the picture.")
    return caption


def _read_image(path: Path, resolution_px: int) -> Tensor:
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} cannot be read as a picture; replace or remove it.") from error
    if min(picture.size) < resolution_px:
        raise ValueError(
            f"{path} is {picture.width} x {picture.height} px, smaller than data.resolution_px "
            f"{resolution_px}; remove it, or lower the resolution."
        )
    square = ImageOps.fit(picture, (resolution_px, resolution_px), Image.Resampling.LANCZOS)
    pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8)
    return pixels.view(resolution_px, resolution_px, 3).permute(2, 0, 1).float() / 127.5 - 1
