"""Where results go: a folder with something in it is never written to unasked."""

from __future__ import annotations

from pathlib import Path

CHECKPOINTS = "checkpoints"
"""The folder of a run that holds its checkpoints."""


def check_output_directory(path: str | Path, option: str) -> Path:
    """`path`, if it is missing or an empty folder; the error names `option`."""
    path = Path(path)
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
