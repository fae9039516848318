"""Training captions from text files, tables and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .rows import (
    HUB,
    ParquetRows,
    column_names,
    is_saved_dataset,
    open_dataset,
    pick_column,
    read_csv,
    read_jsonl,
)

if TYPE_CHECKING:
    from .settings import DataConfig

KEY = "data.prompts"
KINDS = ".txt, .jsonl, .csv or .parquet file, or a folder that datasets.save_to_disk wrote"


def read_prompts(settings: DataConfig) -> list[str]:
    """The captions that `data.prompts` names, without blank ends; empty ones are skipped.

    FileNotFoundError or ValueError with the remedy for what cannot be read or holds no caption.
    """
    source = settings.prompts
    path = Path(source)
    if source.startswith(HUB) or (path.is_dir() and is_saved_dataset(path)):
        found = _of_dataset(settings)
    elif path.is_dir():
        raise ValueError(f"{KEY} is {source!r}, a folder without captions; name a {KINDS}.")
    elif not path.exists():
        raise FileNotFoundError(
            f"{KEY} is {source!r}, which does not exist; name a {KINDS}, "
            "or write hub:OWNER/NAME for a dataset of the Hugging Face hub."
        )
    else:
        found = _of_file(path, settings)
    prompts = [text.strip() for text in found if isinstance(text, str) and text.strip()]
    if not prompts:
        raise ValueError(f"{KEY} {source!r} has no caption; write at least one.")
    return prompts


def _of_file(path: Path, settings: DataConfig) -> Iterable[Any]:
    suffix, wanted = path.suffix.lower(), settings.prompt_column
    if suffix == ".txt":
        return _lines(path)
    if suffix == ".jsonl":
        return (
            row[pick_column(row, wanted, "data.prompt_column", f"{path}, line {number}")]
            for number, row in read_jsonl(path, KEY)
        )
    if suffix == ".csv":
        return (
            row[pick_column(row, wanted, "data.prompt_column", str(path))]
            for row in read_csv(path, KEY)
        )
    if suffix == ".parquet":
        table = ParquetRows([path])
        column = pick_column(table.columns, wanted, "data.prompt_column", str(path))
        return (row[column] for row in table.iterate([column]))
    raise ValueError(f"{KEY} is {str(path)!r}, whose format is unknown; name a {KINDS}.")


def _of_dataset(settings: DataConfig) -> Iterable[Any]:
    dataset = open_dataset(settings.prompts, settings, KEY)
    column = pick_column(
        column_names(dataset), settings.prompt_column, "data.prompt_column", settings.prompts
    )
    return (row[column] for row in dataset.select_columns([column]))


def read_prompt_lines(path: Path, key: str) -> list[str]:
    """The lines of a text file without blank ends; empty ones are skipped. `key`: for errors."""
    if not path.is_file():
        raise FileNotFoundError(f"{key} is {str(path)!r}, which is no file; name a .txt file.")
    prompts = [text.strip() for text in _lines(path, key) if text.strip()]
    if not prompts:
        raise ValueError(f"{key} {str(path)!r} has no prompt; write at least one.")
    return prompts


def _lines(path: Path, key: str = KEY) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{key} {str(path)!r} is not UTF-8 text (line {line}); save it as UTF-8."
        ) from error
