"""One captioned picture of a source, read when it is needed, and what makes one unusable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class BadSampleError(ValueError):
    """A sample that cannot be used.

    Training without a cache stops at it; `dmd2 prepare` leaves it out, counts it under `reason`
    and lists it in its report.
    """

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """A picture with its caption, read by `load`, which raises BadSampleError."""

    name: str
    """For people: a path, or a file and the place in it."""
    stamp: Callable[[], str]
    """A text that changes when picture or caption do; cheap where files tell size and time."""
    load: Callable[[], tuple[Image | Tensor, str]]
    """The picture, or its pixels (3, H, W) in [-1, 1] at the size of a bucket, and the caption."""


def file_stamp(*paths: Path) -> str:
    """Size and time of last change of each file; "-" for one that is not there."""
    parts = []
    for path in paths:
        if path.is_file():
            facts = path.stat()
            parts.append(f"{facts.st_size} {facts.st_mtime_ns}")
        else:
            parts.append("-")
    return ", ".join(parts)


def checked_caption(caption: object, name: str, remedy: str) -> str:
    """The caption without blank ends; BadSampleError if there is none or nothing in it."""
    if caption is None:
        raise BadSampleError("no caption", f"{name} has no caption; {remedy}.")
    if not isinstance(caption, str) or not caption.strip():
        kind = "an empty caption" if isinstance(caption, str) else "a caption that is no text"
        raise BadSampleError("empty caption", f"{name} has {kind}; {remedy}.")
    return caption.strip()


def raising(error: Exception) -> Callable[[], tuple[Image | Tensor, str]]:
    """A `load` for a sample that is known to be bad before it is read."""

    def load() -> tuple[Image | Tensor, str]:
        raise error

    return load
