"""Whether the files that a cache was made from are as they were: names, sizes, times of change.

`dmd2 prepare` records them, before it reads them; training compares where they are at hand.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import Config
from .cache import AGAIN, read_complete, settings_of
from .demo_data import DEMO
from .rows import HUB
from .sources import files_of

SOURCES = "sources.json"
TEACHER = "teacher"


def source_stamps(config: Config) -> dict[str, dict[str, Any]]:
    """Key -> the place of a source on this machine and each file's name, size and time (ns)."""
    return {
        key: {"place": str(path.resolve()), "files": _stamps(path)}
        for key, path in _local_sources(config).items()
        if path.exists()
    }


def changed_sources(config: Config) -> str | None:
    """What is no longer as it was prepared, in words; None where nothing is, or nothing is here.

    Sources that were moved or copied elsewhere are compared by names and sizes alone: copies have
    other times. ValueError for a cache that is missing, incomplete or damaged.
    """
    assert config.data.cache is not None
    folder = Path(config.data.cache)
    read_complete(folder)
    try:
        recorded = json.loads((folder / SOURCES).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder / SOURCES} is missing or damaged; {AGAIN}, which keeps what is encoded."
        ) from error
    for key, now in source_stamps(config).items():
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
            return _sentence(config, key, old, new, differing)
    return None


def _sentence(
    config: Config, key: str, old: dict[str, Any], new: dict[str, Any], differing: list[str]
) -> str:
    kinds = {
        "changed": sum(name in old and name in new for name in differing),
        "new": sum(name not in old for name in differing),
        "gone": sum(name not in new for name in differing),
    }
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    example = _local_sources(config)[key] / differing[0]
    return (
        f"data.cache {config.data.cache!r} is older than {key}: files there are not as "
        f"dmd2 prepare found them ({counts}), such as {example}"
    )


def _local_sources(config: Config) -> dict[str, Path]:
    found = {}
    for key in ("data.prompts", "data.real_images"):
        source = getattr(config.data, key.partition(".")[2])
        special = source in (None, DEMO, TEACHER) or source.startswith(HUB)
        if key in settings_of(config) and not special:
            found[key] = Path(source)
    return found


def _stamps(path: Path) -> dict[str, list[int]]:
    stamps = {}
    for file in files_of(path)[1]:
        facts = file.stat()
        stamps[file.relative_to(path).as_posix()] = [facts.st_size, facts.st_mtime_ns]
    return stamps
