"""Whether the files that a cache was made from are as they were: names, sizes, times of change.

`dmd2 prepare` and `dmd2 pairs` record them, before they read them; training compares where they
are at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import Config
from .cache import CACHE, Kind, read_complete
from .demo_data import DEMO
from .rows import HUB
from .sources import files_of

SOURCES = "sources.json"
TEACHER = "teacher"


def source_stamps(config: Config, kind: Kind = CACHE) -> dict[str, dict[str, Any]]:
    """Key -> the place of a source on this machine and each file's name, size and time (ns)."""
    return {
        key: {"place": str(path.resolve()), "files": _stamps(path)}
        for key, path in _local_sources(config, kind).items()
        if path.exists()
    }


def changed_sources(config: Config, kind: Kind = CACHE) -> str | None:
    """What is no longer as it was prepared, in words; None where nothing is, or nothing is here.

    Sources that were moved or copied elsewhere are compared by names and sizes alone: copies have
    other times. ValueError for a cache that is missing, incomplete or damaged.
    """
    folder = kind.folder(config)
    assert folder is not None
    read_complete(folder, kind)
    try:
        recorded = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / SOURCES} is missing or damaged; {kind.again}, which keeps what is encoded."
        ) from error
    for key, now in source_stamps(config, kind).items():
        then = recorded.get(key)
        if then is None:  # prepared for other settings, which is told elsewhere
            continue
        num_compared = 2 if then["place"] == now["place"] else 1
        old, new = (
            {name: facts[:num_compared] for name, facts in stamps["files"].items()}
            for stamps in (then, now)
        )
        differing = sorted(name for name in old | new if old.get(name) != new.get(name))
        if differing:
            example = _local_sources(config, kind)[key] / differing[0]
            return (
                f"{kind.key} {str(folder)!r} is older than {key}: files there are not as "
                f"{kind.command} found them ({_counts(old, new, differing)}), such as {example}"
            )
    return None


def _counts(old: dict[str, Any], new: dict[str, Any], differing: list[str]) -> str:
    kinds = {
        "changed": sum(name in old and name in new for name in differing),
        "new": sum(name not in old for name in differing),
        "gone": sum(name not in new for name in differing),
    }
    return ", ".join(f"{count} {what}" for what, count in kinds.items() if count)


def _local_sources(config: Config, kind: Kind) -> dict[str, Path]:
    found = {}
    for key in ("data.prompts", "data.real_images"):
        source = getattr(config.data, key.partition(".")[2])
        special = source in (None, DEMO, TEACHER) or source.startswith(HUB)
        if key in kind.settings_of(config) and not special:
            found[key] = Path(source)
    return found


def _stamps(path: Path) -> dict[str, list[int]]:
    stamps = {}
    for file in files_of(path)[1]:
        facts = file.stat()
        stamps[file.relative_to(path).as_posix()] = [facts.st_size, facts.st_mtime_ns]
    return stamps
