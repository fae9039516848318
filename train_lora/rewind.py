"""Going back to an earlier checkpoint of a run: what came after it is set aside, not lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

from .best import BEST_FILE, HISTORY_FILE, noted, protected_checkpoints
from .checkpoint_store import write_text
from .output import CHECKPOINTS

SET_ASIDE = "set_aside"
NUMBERED = (CHECKPOINTS, "samples", "panels")
"""Folders of a run whose entries are named by the iterations done."""
RESULTS = ("lora.safetensors", "student.safetensors")
"""What the end of a run writes."""


def set_aside(run: Path, iteration: int) -> Path | None:
    """Move what the run made after `iteration` to RUN/set_aside/NNN; None where there is nothing.

    The folder there can be exported from like a run. If this is killed, doing it again moves the
    rest, into a folder of its own.
    """
    later = list(_later(run, iteration))
    lines = noted(run) if (run / HISTORY_FILE).exists() else []
    kept = [line for line in lines if line["iteration"] <= iteration]
    if not later and len(kept) == len(lines):
        return None
    number = 1 + sum(1 for _ in (run / SET_ASIDE).glob("*"))
    folder = run / SET_ASIDE / f"{number:03d}"
    folder.mkdir(parents=True)
    if len(kept) < len(lines):
        shutil.copyfile(run / HISTORY_FILE, folder / HISTORY_FILE)
        write_text(run / HISTORY_FILE, "".join(json.dumps(line) + "\n" for line in kept))
    for path in later:
        target = folder / path.relative_to(run)
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    return folder


def _later(run: Path, iteration: int) -> Iterator[Path]:
    """Everything that speaks of an iteration after this one, the newest checkpoint first."""
    for name in NUMBERED:
        for path in sorted((run / name).glob("[0-9]*"), reverse=True):
            if path.stem.isdecimal() and int(path.stem) > iteration:
                yield path
    if any(best > iteration for best in protected_checkpoints(run)):
        yield run / BEST_FILE
    for name in RESULTS:
        if (run / name).exists():
            yield run / name
