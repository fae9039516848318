"""Checkpoint folders: there whole or not at all, found again, checked, purged.

RUN/checkpoints/000120 is written as `.000120.partial`, flushed, its files' hashes put into a
manifest, and renamed into place. Nothing here knows what the files hold.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .output import CHECKPOINTS, writing

MANIFEST = "manifest.json"
FORMAT = 1

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointStore:
    """The checkpoints of one run; only its main process writes."""

    run: Path
    keep_last: int
    keep_every: int
    """Iterations; checkpoints at multiples of it are never purged. 0: none is so kept."""
    protected: Callable[[], Set[int]] = frozenset
    """Iterations whose checkpoints are not purged either, as things stand when it is called."""

    def write(self, iteration: int, num_bytes: int, fill: Callable[[Path], None]) -> Path:
        """Save what `fill` writes into the folder it is given, about `num_bytes`; then purge.

        Raises ValueError if it cannot be saved; what was there before stays as it was.
        """
        folder = self.run / CHECKPOINTS / f"{iteration:06d}"
        partial = folder.with_name(f".{folder.name}.partial")
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            _check_space(partial, num_bytes)
            fill(partial)
            _seal(partial, iteration)
            _replace(partial, folder)
        except OSError as error:
            then = "start again."
            if checkpoints(self.run):
                then = f"go on from the one before with: dmd2 train --resume {self.run}"
            raise ValueError(
                f"The checkpoint of iteration {iteration} cannot be saved in {folder.parent} "
                f"({error.strerror or error}); earlier ones are untouched. Mend that, then {then}"
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.purge()
        for pattern in (".*.partial", ".*.removed"):  # of processes killed earlier
            for leftover in folder.parent.glob(pattern):
                shutil.rmtree(leftover, ignore_errors=True)
        return folder

    def purge(self) -> None:
        """Remove what is not to be kept; failing at it is no reason to end a run."""
        try:
            protected = self.protected()
        except (OSError, ValueError) as error:
            log.warning("no old checkpoint is removed: %s", error)
            return
        for folder in checkpoints(self.run)[self.keep_last :]:
            iteration = int(folder.name)
            if iteration in protected or (self.keep_every and iteration % self.keep_every == 0):
                continue
            try:
                _remove(folder)
            except OSError as error:
                log.warning("the old checkpoint %s cannot be removed (%s)", folder, error)


def checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, complete or damaged, newest first."""
    directory = run / CHECKPOINTS
    if not directory.is_dir():
        return []
    found = [path for path in directory.iterdir() if path.name.isdecimal() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name), reverse=True)


def newest_complete(run: Path) -> Path:
    """The newest checkpoint whose files are as they were written; others are named in warnings.

    Raises ValueError if there is none.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is no folder; name the folder of a run.")
    for unfinished in sorted((run / CHECKPOINTS).glob(".*.partial")):
        log.warning("%s was never finished and is not used", unfinished)
    found = checkpoints(run)
    for folder in found:
        reason = damage(folder)
        if reason is None:
            return folder
        log.warning("the checkpoint %s is skipped: %s", folder, reason)
    state = "every checkpoint in it is damaged" if found else "it has no checkpoint"
    raise ValueError(f"{run} cannot be used: {state}. Name another folder, or start a new run.")


def complete_at(run: Path, iteration: int) -> Path:
    """The checkpoint of that iteration; ValueError where it is missing or damaged."""
    found = {int(folder.name): folder for folder in checkpoints(run)}
    if iteration not in found:
        have = ", ".join(map(str, sorted(found))) or "none"
        raise ValueError(f"{run} has no checkpoint of iteration {iteration}; it has: {have}.")
    reason = damage(found[iteration])
    if reason is not None:
        raise ValueError(
            f"The checkpoint {found[iteration]} is damaged: {reason}. Name another one, or the "
            "run's folder for the newest complete one."
        )
    return found[iteration]


def damage(folder: Path) -> str | None:
    """What is wrong with the checkpoint; None if every file has its size and sha256."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            return f"its format is {manifest['format']}, this version reads {FORMAT}"
        for name, entry in manifest["files"].items():
            path = folder / Path(name).name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes and not {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"{name} is not what was written (sha256 differs)"
    except OSError as error:
        return f"{Path(error.filename or folder).name}: {error.strerror or error}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} cannot be read"
    return None


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text`, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path), partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _check_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        needed = f"it needs {num_bytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
        raise OSError(f"no space left: {needed}")


def _seal(folder: Path, iteration: int) -> None:
    """Flush all files, write their sizes and hashes into the manifest, flush that."""
    files: dict[str, Any] = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "iteration": iteration, "files": files}
    write_text(folder / MANIFEST, json.dumps(manifest, indent=1) + "\n")
    _flush_folder(folder)


def _replace(partial: Path, folder: Path) -> None:
    """Rename into place; a damaged checkpoint of the same iteration gives way."""
    if folder.exists():
        _remove(folder)
    partial.rename(folder)
    _flush_folder(folder.parent)


def _remove(folder: Path) -> None:
    """Renamed first, so that half of it can never be taken for a checkpoint."""
    removed = folder.with_name(f".{folder.name}.removed")
    shutil.rmtree(removed, ignore_errors=True)
    folder.rename(removed)
    shutil.rmtree(removed)


def _flush_folder(folder: Path) -> None:
    """Make renames in `folder` durable, where the system knows how."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
