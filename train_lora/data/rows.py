"""Tables that users bring: JSON lines, CSV, TSV, parquet and Hugging Face datasets, as rows."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

    from .settings import DataConfig

HUB = "hub:"
CAPTION_COLUMNS = ("text", "caption", "prompt")


def pick_column(
    names: Iterable[str],
    wanted: str | None,
    key: str,
    source: str,
    candidates: Sequence[str] = CAPTION_COLUMNS,
) -> str:
    """`wanted`, or the first of the candidates that `names` has; ValueError naming `key`.

    Capitals count only where two names differ in nothing else: PartiPrompts has a "Prompt".
    """
    names = list(names)
    if wanted is not None:
        if wanted in names:
            return wanted
        problem = f"has no column {wanted!r}"
    else:
        for name in candidates:
            if name in names:
                return name
        folded = {name.casefold(): name for name in reversed(names)}
        for name in candidates:
            if name in folded:
                return folded[name]
        problem = f"has none of the columns {', '.join(candidates)}"
    raise ValueError(
        f"{source} {problem}; set {key} to one of {', '.join(names) or 'its columns'}."
    )


# JSON lines, CSV and TSV


def read_jsonl(path: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, row) of each line that is not blank; ValueError for what is no JSON object."""
    for number, line in enumerate(_text_lines(path, key), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(
                f"{path}, line {number} is not JSON ({error}); write one object on each line."
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is no JSON object; write one on each line.")
        yield number, row


def read_csv(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a CSV file whose first line names the columns."""
    try:
        yield from csv.DictReader(_text_lines(path, key), strict=True)
    except csv.Error as error:
        raise ValueError(f"{key} {str(path)!r} is not valid CSV ({error}); mend it.") from error


def read_tsv(path: Path, key: str) -> Iterator[dict[str, Any]]:
    """The rows of a file of tab-separated columns, named in its first line; quotes are text."""
    yield from csv.DictReader(_text_lines(path, key), delimiter="\t", quoting=csv.QUOTE_NONE)


def _text_lines(path: Path, key: str) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{key} {str(path)!r} is not UTF-8 text (line {number}); save it as UTF-8."
                ) from error


# Parquet


class ParquetRows:
    """Random access to the rows of parquet files; a row group at a time is held in memory."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._groups = [
            (file, group, opened.metadata.row_group(group).num_rows)
            for file in self.files
            for opened in [self._opened(file)]
            for group in range(opened.num_row_groups)
        ]
        self._group = functools.lru_cache(maxsize=2)(self._read_group)

    @property
    def columns(self) -> list[str]:
        """Of the first file; the others must have those that are read."""
        return list(self._opened(self.files[0]).schema_arrow.names)

    def iterate(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        for number in range(len(self._groups)):
            yield from self._group(number, tuple(columns)).to_pylist()

    def places(self) -> Iterator[tuple[int, int]]:
        """(row group, row in it) of all rows."""
        for number, (_, _, num_rows) in enumerate(self._groups):
            yield from ((number, row) for row in range(num_rows))

    def row(self, place: tuple[int, int], columns: Sequence[str]) -> dict[str, Any]:
        group = self._group(place[0], tuple(columns))
        (row,) = group.slice(place[1], 1).to_pylist()
        return dict(row)

    def _read_group(self, number: int, columns: tuple[str, ...]) -> Any:
        file, group, _ = self._groups[number]
        opened = self._opened(file)
        for name in columns:
            if name not in opened.schema_arrow.names:
                raise ValueError(f"{file} has no column {name!r}; all files must have the same.")
        return opened.read_row_group(group, columns=list(columns))

    @staticmethod
    def _opened(file: Path) -> Any:
        import pyarrow
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(
                f"{file} cannot be read as parquet ({str(error).splitlines()[0]}); "
                "write or download it again."
            ) from error


# Hugging Face datasets


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "dataset_info.json").is_file() and (folder / "state.json").is_file()
    )


def open_dataset(source: str, settings: DataConfig, key: str) -> Dataset | IterableDataset:
    """A saved dataset, or one of the hub: only `hub:OWNER/NAME` ever uses the network."""
    import datasets

    if not source.startswith(HUB):
        try:
            found = datasets.load_from_disk(source)
        except (OSError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"{key} {source!r} cannot be read as a saved dataset ({reason}); save it again."
            ) from error
        if not isinstance(found, datasets.DatasetDict):
            return found
        if settings.split not in found:
            raise ValueError(
                f"{key} {source!r} has no split {settings.split!r}; "
                f"set data.split to one of {', '.join(found)}."
            )
        return found[settings.split]
    name = source.removeprefix(HUB)
    if name.count("/") > 1 or Path(name).exists():
        raise ValueError(f"{key} is {source!r}; write hub:OWNER/NAME, or the local path alone.")
    try:
        return datasets.load_dataset(name, split=settings.split, streaming=settings.stream)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"{key} {source!r} cannot be read from the Hugging Face hub ({reason}); check the "
            "name, data.split and the network."
        ) from error


def column_names(dataset: Dataset | IterableDataset) -> list[str]:
    """The columns; of a streamed dataset that does not declare them, those of its first row."""
    if dataset.column_names is not None:
        return list(dataset.column_names)
    first: Mapping[str, Any] = next(iter(dataset), {})
    return list(first)
