"""Folders of runs: one with something in it is never written to unasked."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""


def check_output_directory(path: str | Path, option: str) -> Path:
    """`path`, if it is an empty folder or one can be made there; the error names `option`."""
    path = Path(path)
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there != path and not there.is_dir():
        raise ValueError(f"{option} is {str(path)!r}, but {there} is a file; name a folder.")
    if not os.access(there, os.W_OK):
        raise ValueError(
            f"{option} is {str(path)!r}, but {there} cannot be written to; name another."
        )
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} is {str(path)!r}, which is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()):
        resume = ""
        if any((path / CHECKPOINTS).glob("[0-9]*")):
            resume = f", or continue its training with dmd2 train --resume {path}"
        raise ValueError(
            f"{option} is {str(path)!r}, a folder that is not empty; "
            f"name another one, or move this one away{resume}."
        )
    return path


def run_and_iteration(path: Path) -> tuple[Path, int | None]:
    """A run's folder, and the iteration where `path` is RUN/checkpoints/ITERATION."""
    is_checkpoint = path.parent.name == CHECKPOINTS and path.name.isdecimal()
    if is_checkpoint and not (path / "config.toml").exists():  # a run could be called so
        return path.parent.parent, int(path.name)
    return path, None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """An OSError in here names `path`: the system does not say what a failing write was for."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
