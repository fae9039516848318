"""Where results go: a folder with something in it is never written to unasked."""

from __future__ import annotations

from pathlib import Path


def check_output_directory(path: str | Path, option: str) -> Path:
    """`path`, if it is missing or an empty folder; the error names `option`."""
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} is {str(path)!r}, which is a file; name a folder.")
    if path.is_dir() and any(path.iterdir()):
        raise ValueError(
            f"{option} is {str(path)!r}, a folder that is not empty; "
            "name another one, or move this one away."
        )
    return path
