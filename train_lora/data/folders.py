"""Folders of pictures: captions in .txt files beside them, or in one metadata.jsonl."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from .images import SUFFIXES, open_picture
from .rows import pick_column, read_jsonl
from .samples import BadSampleError, Sample, checked_caption, file_stamp, raising

METADATA = "metadata.jsonl"


def visible_files(folder: Path) -> list[Path]:
    """All files below `folder` in the order of their names; hidden ones are none."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def picture_files(folder: Path) -> list[Path]:
    """All pictures below `folder` in the order of their names; hidden files are none."""
    return [path for path in visible_files(folder) if path.suffix.lower() in SUFFIXES]


def captioned_files(folder: Path) -> list[Path]:
    """All pictures and .txt files below `folder`."""
    return [path for path in visible_files(folder) if path.suffix.lower() in (*SUFFIXES, ".txt")]


def captioned_folder(folder: Path) -> Iterator[Sample]:
    """Each picture with the .txt file of the same name (the kohya habit).

    A .txt file without picture is a bad sample as well: something is misnamed or lost.
    """
    files = captioned_files(folder)
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    stems = {path.with_suffix("") for path in pictures}
    for path in pictures:
        yield _beside(path)
    for path in files:
        if path.suffix.lower() == ".txt" and path.with_suffix("") not in stems:
            yield _orphan(path)


def _beside(path: Path) -> Sample:
    caption_file = path.with_suffix(".txt")

    def load() -> tuple[Any, str]:
        caption = _read_text(caption_file) if caption_file.is_file() else None
        remedy = f"write one into {caption_file}, or remove the picture"
        caption = checked_caption(caption, str(path), remedy)
        return open_picture(path, str(path)), caption

    return Sample(name=str(path), stamp=lambda: file_stamp(path, caption_file), load=load)


def _orphan(path: Path) -> Sample:
    error = BadSampleError(
        "caption without picture",
        f"{path} is a caption without a picture; add it or remove {path}.",
    )
    return Sample(name=str(path), stamp=lambda: file_stamp(path), load=raising(error))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadSampleError(
            "unreadable caption", f"{path} is not UTF-8 text; save it as UTF-8."
        ) from error


def metadata_folder(folder: Path, caption_column: str | None) -> Iterator[Sample]:
    """Pictures named by the `file_name` of each line of metadata.jsonl, captions beside it."""
    file = folder / METADATA
    rows = list(read_jsonl(file, "data.real_images"))
    listed = set()
    for number, row in rows:
        place = f"{file}, line {number}"
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise ValueError(f"{place} has no file_name; name the picture there.")
        parts = PurePosixPath(name.replace("\\", "/")).parts
        if ".." in parts or Path(name).is_absolute():
            raise ValueError(f"{place} names {name!r}, which is outside of {folder}; move it in.")
        path = folder.joinpath(*parts)
        listed.add(path)
        column = pick_column(row, caption_column, "data.caption_column", place)
        yield _described(path, row[column], place)
    for path in picture_files(folder):
        if path not in listed:
            error = BadSampleError(
                "no caption", f"{path} has no line in {file}; add one, or remove the picture."
            )
            yield Sample(name=str(path), stamp=lambda p=path: file_stamp(p), load=raising(error))


def _described(path: Path, caption: object, place: str) -> Sample:
    def load() -> tuple[Any, str]:
        if not path.is_file():
            raise BadSampleError(
                "caption without picture", f"{place} names {path}, which does not exist; mend it."
            )
        text = checked_caption(caption, str(path), f"write one into {place}")
        return open_picture(path, str(path)), text

    return Sample(name=str(path), stamp=lambda: f"{file_stamp(path)} {caption!r}", load=load)
