"""A folder of pictures as metrics see it: files in order, captions, squares of pixels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..data.folders import METADATA, picture_files
from ..data.images import open_picture
from ..data.rows import pick_column, read_jsonl

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureFolder:
    """Pictures in the order of their names."""

    files: list[Path]
    captions: list[str] | None
    """One for each picture; None where the folder has none at all."""

    def __len__(self) -> int:
        return len(self.files)

    def open(self, number: int) -> Image:
        return open_picture(self.files[number], str(self.files[number]))

    def groups(self) -> list[list[int]]:
        """The numbers of the pictures of each caption that has two or more."""
        rows: dict[str, list[int]] = {}
        for number, caption in enumerate(self.captions or ()):
            rows.setdefault(caption, []).append(number)
        return [group for group in rows.values() if len(group) > 1]


def read_folder(folder: Path, option: str) -> PictureFolder:
    """All pictures below `folder`; captions from metadata.jsonl or .txt files beside them."""
    if not folder.is_dir():
        raise ValueError(f"{option} is {str(folder)!r}, which is no folder; name one of pictures.")
    files = picture_files(folder)
    if not files:
        raise ValueError(
            f"{option} {str(folder)!r} has no pictures (.png, .jpg, .jpeg, .webp); add some."
        )
    return PictureFolder(files=files, captions=_captions(folder, files))


def _captions(folder: Path, files: list[Path]) -> list[str] | None:
    known = dict(_described(folder)) if (folder / METADATA).is_file() else dict(_beside(files))
    if not known:
        return None
    for file in files:
        if file not in known:
            raise ValueError(f"{file} has no caption, but others in {folder} do; write one.")
    return [known[file] for file in files]


def _described(folder: Path) -> Iterator[tuple[Path, str]]:
    for number, row in read_jsonl(folder / METADATA, METADATA):
        place = f"{folder / METADATA}, line {number}"
        column = pick_column(row, None, "the caption's name", place)
        yield folder / str(row.get("file_name")), str(row[column])


def _beside(files: list[Path]) -> Iterator[tuple[Path, str]]:
    for file in files:
        text = file.with_suffix(".txt")
        if text.is_file():
            yield file, text.read_text(encoding="utf-8-sig").strip()


def square(picture: Image, resize_px: int | None) -> Image:
    """Its middle as a square, `resize_px` wide (Lanczos) unless that is None.

    Source: what the DMD2 paper's evaluation does to pictures before FID, with 512 px.
    """
    from PIL import Image

    side = min(picture.size)
    if picture.size != (side, side):
        picture = middle(picture, side)
    if resize_px is None or resize_px == side:
        return picture
    return picture.resize((resize_px, resize_px), Image.Resampling.LANCZOS)


def middle(picture: Image, side_px: int) -> Image:
    """The square of this side in its middle, at full resolution: what patch FID looks at."""
    left, top = (picture.width - side_px) // 2, (picture.height - side_px) // 2
    return picture.crop((left, top, left + side_px, top + side_px))


def scaled_to(picture: Image, side_px: int) -> Image:
    """A square picture for a network of this input size: bicubic with antialiasing.

    Source: Parmar et al., arXiv 2104.11222 ("clean FID"); here rounded to 8 bits afterwards.
    """
    from PIL import Image

    if picture.size == (side_px, side_px):
        return picture
    return picture.resize((side_px, side_px), Image.Resampling.BICUBIC)


def pixels(picture: Image) -> Tensor:
    """(3, H, W) uint8."""
    values = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return values.view(picture.height, picture.width, 3).permute(2, 0, 1)
