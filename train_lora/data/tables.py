"""Captioned pictures out of parquet files and Hugging Face datasets."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import open_picture
from .rows import ParquetRows, column_names, open_dataset, pick_column
from .samples import BadSampleError, Sample, checked_caption

if TYPE_CHECKING:
    from .settings import DataConfig

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp")
KEY = "data.real_images"


def parquet_samples(files: Sequence[Path], settings: DataConfig) -> Iterator[Sample]:
    """One sample for each row; a row group is in memory at a time."""
    table = ParquetRows(files)
    image, caption = _columns(table.columns, settings)
    for number, place in enumerate(table.places()):
        yield _sample(
            f"{settings.real_images}, row {number}",
            lambda place=place: table.row(place, [image, caption]),
            image,
            caption,
        )


def dataset_samples(settings: DataConfig) -> Iterator[Sample]:
    """One sample for each row of a saved dataset or of one of the hub; streamed rows are read in
    turn, others by their number."""
    import datasets

    assert settings.real_images is not None
    dataset = open_dataset(settings.real_images, settings, KEY)
    image, caption = _columns(column_names(dataset), settings)
    features = dataset.features or {}
    if isinstance(features.get(image), datasets.Image):  # bytes: damage is found one by one
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    dataset = dataset.select_columns([image, caption])
    if isinstance(dataset, datasets.IterableDataset):
        for number, row in enumerate(dataset):
            name = f"{settings.real_images}, row {number}"
            yield _sample(name, lambda row=row: row, image, caption)
        return
    for number in range(len(dataset)):
        name = f"{settings.real_images}, row {number}"
        yield _sample(name, lambda number=number: dataset[number], image, caption)


def _columns(names: list[str], settings: DataConfig) -> tuple[str, str]:
    source = f"{KEY} {settings.real_images!r}"
    image = pick_column(names, settings.image_column, "data.image_column", source, IMAGE_COLUMNS)
    caption = pick_column(names, settings.caption_column, "data.caption_column", source)
    return image, caption


def _sample(name: str, read: Callable[[], dict[str, Any]], image: str, caption: str) -> Sample:
    def stamp() -> str:
        row = read()
        content = _content(row[image], name)
        crc = zlib.crc32(content if isinstance(content, bytes) else str(content).encode())
        return f"{crc} {row[caption]!r}"

    def load() -> tuple[Any, str]:
        row = read()
        text = checked_caption(row[caption], name, "write one, or remove the row")
        content = _content(row[image], name)
        if content is None:
            raise BadSampleError("unreadable", f"{name} holds no picture; remove the row.")
        return open_picture(content, name), text

    return Sample(name=name, stamp=stamp, load=load)


def _content(cell: Any, name: str) -> bytes | Path | None:
    """The picture's bytes or file: of {"bytes", "path"}, as Hugging Face stores it, or of bytes."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None:
            return None if cell.get("path") is None else Path(cell["path"])
        cell = cell["bytes"]
    if cell is None or isinstance(cell, bytes):
        return cell
    raise ValueError(
        f"{name} has a {type(cell).__name__} where a picture should be; set data.image_column."
    )
