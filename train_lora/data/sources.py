"""`data.real_images`: which kind of source it names."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from .folders import METADATA, captioned_folder, metadata_folder, picture_files
from .rows import HUB, is_saved_dataset
from .samples import Sample
from .tables import KEY, dataset_samples, parquet_samples
from .tars import tar_samples

if TYPE_CHECKING:
    from .settings import DataConfig

KINDS = (
    "a folder of pictures with .txt captions or with a metadata.jsonl, WebDataset .tar files, "
    ".parquet files, or a folder that datasets.save_to_disk wrote"
)


def check_sources(settings: DataConfig) -> None:
    """ValueError for prompts or pictures that do not exist: before a model is loaded for them."""
    if settings.cache is not None:  # holds their content, perhaps on another machine
        return
    for key, source in (("data.prompts", settings.prompts), (KEY, settings.real_images)):
        if source in (None, "demo", "teacher") or source.startswith(HUB):
            continue
        if not Path(source).exists():
            raise ValueError(
                f"{key} is {source!r}, which does not exist; name a file or folder, or write "
                "hub:OWNER/NAME for a dataset of the Hugging Face hub."
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
    if path.is_file():
        if path.suffix.lower() == ".tar":
            return tar_samples([path], settings.caption_column)
        if path.suffix.lower() == ".parquet":
            return parquet_samples([path], settings)
        raise ValueError(f"{KEY} is {source!r}, whose format is unknown; name {KINDS}.")
    if not path.is_dir():
        raise ValueError(
            f"{KEY} is {source!r}, which does not exist; name {KINDS}, or write hub:OWNER/NAME "
            "for a dataset of the Hugging Face hub."
        )
    if is_saved_dataset(path):
        return dataset_samples(settings)
    if (path / METADATA).is_file():
        return metadata_folder(path, settings.caption_column)
    for suffix, open_files in (
        (".tar", lambda files: tar_samples(files, settings.caption_column)),
        (".parquet", lambda files: parquet_samples(files, settings)),
    ):
        files = sorted(path.rglob(f"*{suffix}"))
        if files:
            return open_files(files)
    if not picture_files(path):
        raise ValueError(
            f"{KEY} {source!r} has no picture (.png, .jpg, .webp), .tar or .parquet file; "
            "put captioned pictures there, or set gan.enabled to false."
        )
    return captioned_folder(path)
