"""Encoded samples as tables: in memory, or in the shards of a cache, read row by row."""

from __future__ import annotations

import functools
import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..models.safetensors_io import write_safetensors
from .encode import Encoded, Part

OPEN_SHARDS = 128
STORED_TYPES = {"latents": torch.float16, "hidden": torch.float16, "pooled": torch.float16}
"""Half precision: 3 decimal digits, well below the noise that training adds; the rest float32."""


class Table(Protocol):
    """n samples in the same columns."""

    def __len__(self) -> int: ...

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        """Each column's chosen rows, float32."""

    def captions(self, indices: Sequence[int]) -> list[str]:
        """The captions of the chosen rows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryTable:
    """A `Part` held in memory; without columns it is a list of captions."""

    part: Part

    def __len__(self) -> int:
        return len(self.part.captions)

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        return {
            name: column[indices.to(column.device)] for name, column in self.part.columns.items()
        }

    def captions(self, indices: Sequence[int]) -> list[str]:
        return [self.part.captions[index] for index in indices]

    @classmethod
    def joined(cls, parts: Sequence[Part]) -> MemoryTable:
        columns = {name: torch.cat([p.columns[name] for p in parts]) for name in parts[0].columns}
        captions = [caption for part in parts for caption in part.captions]
        return cls(part=Part(columns=columns, captions=captions))


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """The rows that one shard holds of a part."""

    path: Path
    part: str
    count: int


class ShardTable:
    """One part over all shards; rows are read from the mapped files when a batch needs them."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = list(segments)
        self.ends = list(accumulate(segment.count for segment in segments))
        self._open = functools.lru_cache(maxsize=OPEN_SHARDS)(_open)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def rows(self, indices: Tensor) -> dict[str, Tensor]:
        picked: dict[str, list[Tensor]] = {}
        for index in indices.tolist():
            segment, row = self._locate(index)
            file, columns, _ = self._open(segment.path)
            for name in columns[segment.part]:
                tensor = file.get_slice(f"{segment.part}/{name}")[row : row + 1]
                picked.setdefault(name, []).append(tensor.float())
        return {name: torch.cat(tensors) for name, tensors in picked.items()}

    def captions(self, indices: Sequence[int]) -> list[str]:
        found = []
        for index in indices:
            segment, row = self._locate(index)
            found.append(self._open(segment.path)[2][segment.part][row])
        return found

    def _locate(self, index: int) -> tuple[Segment, int]:
        number = bisect_right(self.ends, index)
        return self.segments[number], index - self.ends[number] + self.segments[number].count


def write_shard(path: Path, encoded: Encoded, stamp: str) -> None:
    """The unit's result, whole or not at all."""
    tensors = {}
    for part_name, part in encoded.parts.items():
        for name, column in part.columns.items():
            tensors[f"{part_name}/{name}"] = column.to(STORED_TYPES.get(name, torch.float32))
    captions = {name: part.captions for name, part in encoded.parts.items()}
    metadata = {
        "stamp": stamp,
        "captions": json.dumps(captions, ensure_ascii=False),
        "left_out": json.dumps(encoded.left_out, ensure_ascii=False),
    }
    write_safetensors(path, tensors, metadata)


def shard_stamp(path: Path) -> str | None:
    """The stamp of a whole shard; None for one that is missing or damaged."""
    if not path.is_file():
        return None
    try:
        return str(read_shard_facts(path)["stamp"])
    except (KeyError, ValueError):
        return None


def read_shard_facts(path: Path) -> dict[str, Any]:
    """stamp, captions (part -> list) and left_out (list of [reason, sentence])."""
    metadata = _handle(path).metadata() or {}
    return {
        "stamp": metadata["stamp"],
        "captions": json.loads(metadata["captions"]),
        "left_out": json.loads(metadata["left_out"]),
    }


def _open(path: Path) -> tuple[Any, dict[str, list[str]], dict[str, list[str]]]:
    """The mapped file, its columns by part, its captions by part."""
    file = _handle(path)
    columns: dict[str, list[str]] = {}
    for key in file.keys():  # noqa: SIM118
        part, _, name = key.partition("/")
        columns.setdefault(part, []).append(name)
    captions = json.loads(file.metadata()["captions"])
    return file, {part: columns.get(part, []) for part in captions}, captions


def _handle(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, framework="pt").__enter__()
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is missing or damaged ({error}); run again what made it (dmd2 prepare or "
            "dmd2 pairs), which makes it anew."
        ) from error
