"""WebDataset tars: files that share a name up to the first dot, one after the other, are a sample.

Read with the standard library: the pictures' places are listed first, so that each process and a
continued preparation read only their own; and nothing in a tar is unpickled or executed.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from .images import SUFFIXES, open_picture
from .rows import pick_column
from .samples import BadSampleError, Sample, checked_caption, file_stamp, raising

CAPTION_SUFFIXES = (".txt", ".caption")


def tar_samples(files: Iterable[Path], caption_column: str | None) -> Iterator[Sample]:
    """The samples of all tars; captions from .txt, .caption, or a column of .json."""
    for file in files:
        members = _members(file)
        for key, group in groupby(members, key=lambda member: _split(member.name)[0]):
            parts = {_split(member.name)[1]: member for member in group}
            yield _sample(file, key, parts, caption_column)


def _members(file: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(file, "r:") as archive:
            members = [member for member in archive if member.isreg()]
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(
            f"{file} cannot be read as a tar file ({error}); write or download it again."
        ) from error
    end = max((member.offset_data + member.size for member in members), default=0)
    if not members or end > file.stat().st_size:
        raise ValueError(f"{file} is empty or cut off; write or download it again.")
    return members


def _split(name: str) -> tuple[str, str]:
    """("folder/0001", ".txt") of "folder/0001.txt": the file's name is cut at its first dot."""
    folder, slash, file = name.rpartition("/")
    stem, dot, suffix = file.partition(".")
    return folder + slash + stem, dot + suffix.lower()


def _sample(
    file: Path, key: str, parts: dict[str, tarfile.TarInfo], caption_column: str | None
) -> Sample:
    name = f"{file}:{key}"
    stamp = f"{file_stamp(file)} {[(m.offset_data, m.size) for m in parts.values()]}"
    picture = next((parts[suffix] for suffix in SUFFIXES if suffix in parts), None)
    if picture is None:
        error = BadSampleError(
            "caption without picture",
            f"{name} has no picture ({', '.join(SUFFIXES)}); write the tar again.",
        )
        return Sample(name=name, stamp=lambda: stamp, load=raising(error))

    def load() -> tuple[Any, str]:
        caption = checked_caption(
            _caption(file, name, parts, caption_column), name, "write the tar again"
        )
        return open_picture(_read(file, picture), name), caption

    return Sample(name=name, stamp=lambda: stamp, load=load)


def _caption(
    file: Path, name: str, parts: dict[str, tarfile.TarInfo], caption_column: str | None
) -> object:
    try:
        if caption_column is None:
            for suffix in CAPTION_SUFFIXES:
                if suffix in parts:
                    return _read(file, parts[suffix]).decode("utf-8-sig")
        if ".json" not in parts:
            return None
        row = json.loads(_read(file, parts[".json"]))
    except ValueError as error:  # not UTF-8, or not JSON
        raise BadSampleError(
            "unreadable caption", f"The caption of {name} cannot be read; write the tar again."
        ) from error
    if not isinstance(row, dict):
        return None
    return row[pick_column(row, caption_column, "data.caption_column", f"{name}.json")]


def _read(file: Path, member: tarfile.TarInfo) -> bytes:
    with file.open("rb") as stream:
        stream.seek(member.offset_data)
        return stream.read(member.size)
