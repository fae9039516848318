"""Training captions from a text file."""

from __future__ import annotations

from pathlib import Path


def read_prompts(path: str | Path) -> list[str]:
    """The captions of a UTF-8 .txt file, one on each line; blank lines are skipped."""
    path = Path(path)
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(
            f"data.prompts is {str(path)!r}, which {kind}; "
            "name a .txt file with one caption on each line."
        )
    if path.suffix.lower() != ".txt":
        raise ValueError(
            f"data.prompts is {str(path)!r}, which is not a .txt file; "
            "write the captions into one, one on each line."
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"data.prompts {str(path)!r} is not UTF-8 text (line {line}); save it as UTF-8."
        ) from error
    prompts = [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise ValueError(f"data.prompts {str(path)!r} has no caption; write one on each line.")
    return prompts
