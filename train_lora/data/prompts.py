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
    read_tsv,
)

if TYPE_CHECKING:
    from .settings import DataConfig

KEY = "data.prompts"
FILES = ".txt, .jsonl, .csv, .tsv or .parquet file"
KINDS = f"{FILES}, or a folder that datasets.save_to_disk wrote"
_TABLES = {".csv": read_csv, ".tsv": read_tsv}


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
        found = _of_file(path, KEY, "data.prompt_column", settings.prompt_column, KINDS)
    return _captions(found, KEY, source)


def read_prompt_file(path: Path, key: str) -> list[str]:
    """The captions of a file, as `read_prompts` reads one, of which `key` (for errors) says no
    column."""
    if not path.is_file():
        raise FileNotFoundError(f"{key} is {str(path)!r}, which is no file; name a {FILES}.")
    return _captions(_of_file(path, key, "the caption's name", None, FILES), key, str(path))


def _captions(found: Iterable[Any], key: str, source: str) -> list[str]:
    prompts = [text.strip() for text in found if isinstance(text, str) and text.strip()]
    if not prompts:
        raise ValueError(f"{key} {source!r} has no caption; write at least one.")
    return prompts


def _of_file(
    path: Path, key: str, column_key: str, wanted: str | None, kinds: str
) -> Iterable[Any]:
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _lines(path, key)
    if suffix == ".jsonl":
        return (
            row[pick_column(row, wanted, column_key, f"{path}, line {number}")]
            for number, row in read_jsonl(path, key)
        )
    if suffix in _TABLES:
        return (
            row[pick_column(row, wanted, column_key, str(path))]
            for row in _TABLES[suffix](path, key)
        )
    if suffix == ".parquet":
        table = ParquetRows([path])
        column = pick_column(table.columns, wanted, column_key, str(path))
        return (row[column] for row in table.iterate([column]))
    raise ValueError(f"{key} is {str(path)!r}, whose format is unknown; name a {kinds}.")


def _of_dataset(settings: DataConfig) -> Iterable[Any]:
    dataset = open_dataset(settings.prompts, settings, KEY)
    column = pick_column(
        column_names(dataset), settings.prompt_column, "data.prompt_column", settings.prompts
    )
    return (row[column] for row in dataset.select_columns([column]))


def _lines(path: Path, key: str) -> list[str]:
    try:
        return path.read_bytes().decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{key} {str(path)!r} is not UTF-8 text (line {line}); save it as UTF-8."
        ) from error
