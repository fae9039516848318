"""`data.real_images`: which kind of source it names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from .folders import (
    METADATA,
    captioned_files,
    captioned_folder,
    metadata_folder,
    picture_files,
    visible_files,
)
from .rows import HUB, is_saved_dataset
from .samples import Sample
from .tables import KEY, dataset_samples, parquet_samples
from .tars import tar_samples

if TYPE_CHECKING:
    from .settings import DataConfig

Kind = Literal["file", "dataset", "metadata", "tar", "parquet", "captioned"]
KINDS = (
    "a folder of pictures with .txt captions or with a metadata.jsonl, WebDataset .tar files, "
    ".parquet files, or a folder that datasets.save_to_disk wrote"
)


def open_samples(settings: DataConfig) -> Iterable[Sample]:
    """The samples of a source on disk or of the hub, in an order that is always the same.

    ValueError for what does not exist, is of no known kind, or cannot be read as a whole.
    """
    source = settings.real_images
    assert source is not None
    path = Path(source)
    if source.startswith(HUB):
        return dataset_samples(settings)
    if not path.exists():
        raise ValueError(
            f"{KEY} is {source!r}, which does not exist; name {KINDS}, or write hub:OWNER/NAME "
            "for a dataset of the Hugging Face hub."
        )
    kind, files = files_of(path)
    if kind == "dataset":
        return dataset_samples(settings)
    if kind == "metadata":
        return metadata_folder(path, settings.caption_column)
    if kind == "tar":
        return tar_samples(files, settings.caption_column)
    if kind == "parquet":
        return parquet_samples(files, settings)
    if kind == "file":
        raise ValueError(f"{KEY} is {source!r}, whose format is unknown; name {KINDS}.")
    if not picture_files(path):
        raise ValueError(
            f"{KEY} {source!r} has no picture (.png, .jpg, .webp), .tar or .parquet file; "
            "put captioned pictures there, or set gan.enabled to false."
        )
    return captioned_folder(path)


def files_of(path: Path) -> tuple[Kind, list[Path]]:
    """What kind of source a file or folder is, and the files that it is read from, sorted."""
    if path.is_file():
        kinds: dict[str, Kind] = {".tar": "tar", ".parquet": "parquet"}
        return kinds.get(path.suffix.lower(), "file"), [path]
    if is_saved_dataset(path):
        return "dataset", visible_files(path)
    if (path / METADATA).is_file():
        return "metadata", [path / METADATA, *picture_files(path)]
    if tars := sorted(path.rglob("*.tar")):
        return "tar", tars
    if tables := sorted(path.rglob("*.parquet")):
        return "parquet", tables
    return "captioned", captioned_files(path)
