"""A folder of encoded samples: shards, a manifest that says of what, and a report.

There are two kinds: what `dmd2 prepare` encodes, and what the teacher makes for `dmd2 pairs`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import Config
from ..config_effects import value_of
from ..config_section import show_value
from ..models.components import Components
from ..models.fingerprint import weights_hash
from .encode import PROMPTS
from .sizes import Size
from .store import Segment, ShardTable

MANIFEST, REPORT = "manifest.json", "report.json"
FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """What a folder is for."""

    key: str
    """Of the configuration, which names the folder."""
    command: str
    """What fills it."""
    noun: str
    """What it holds: in its report, and in the names of its shards."""
    settings_of: Callable[[Config], dict[str, Any]]
    """The settings that decide what is in it, by key."""

    @property
    def again(self) -> str:
        return f"run {self.command} again with this configuration"

    def folder(self, config: Config) -> Path | None:
        """As configured."""
        named = value_of(config, self.key)
        return None if named is None else Path(named)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings that decide what is in the cache, by key; of sources the name alone, so that a
    cache can move to another machine."""
    data, found = config.data, {"data.text": config.data.text}
    if data.text == "cached":
        found |= _of_prompts(config)
    if not config.needs_real_images:
        return found
    found |= {
        "data.real_images": _name(data.real_images),
        "data.resolution_px": data.resolution_px,
        "data.sizes": list(data.sizes),
    }
    if data.real_images == "teacher":
        return found | _of_prompts(config) | {
            "data.teacher_images": data.teacher_images,
            "distribution_matching.guidance": config.distribution_matching.guidance,
            "training.seed": config.training.seed,
        }  # fmt: skip
    return found | {
        "data.min_size_px": data.min_size_px,
        "data.image_column": data.image_column,
        "data.caption_column": data.caption_column,
        "data.split": data.split,
    }


def pair_settings(config: Config) -> dict[str, Any]:
    """The same of the teacher's pairs."""
    return _of_prompts(config) | {
        "data.text": config.data.text,
        "data.resolution_px": config.data.resolution_px,
        "distribution_matching.guidance": config.distribution_matching.guidance,
        "regression.num_pairs": config.regression.num_pairs,
        "regression.teacher_steps": config.regression.teacher_steps,
        "training.seed": config.training.seed,
    }


def _of_prompts(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "data.prompts": _name(data.prompts),
        "data.prompt_column": data.prompt_column,
        "data.split": data.split,
    }


def _name(source: str | None) -> str | None:
    return None if source is None else Path(source).name


CACHE = Kind(key="data.cache", command="dmd2 prepare", noun="pictures", settings_of=settings_of)
PAIRS = Kind(key="regression.pairs", command="dmd2 pairs", noun="pairs", settings_of=pair_settings)


def model_identity(components: Components) -> dict[str, str]:
    """The model's name and two hashes: of the UNet, and of VAE and text encoders, which encode."""
    weights = {f"vae.{name}": tensor for name, tensor in components.vae.state_dict().items()}
    for number, encoder in enumerate(components.text_encoders):
        weights |= {f"text{number}.{name}": t for name, t in encoder.state_dict().items()}
    return {
        "name": components.name,
        "unet": components.base_hash,
        "encoders": weights_hash(weights),
    }


def read_manifest(folder: Path, kind: Kind = CACHE) -> dict[str, Any] | None:
    """What the folder is; None where the folder is missing or empty.

    ValueError for a folder that holds something else, which is never written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{kind.key} is {str(folder)!r}, which is a file; name a folder.")
    file = folder / MANIFEST
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{kind.key} is {str(folder)!r}, a folder that is not empty and no cache; name "
                "another."
            )
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return dict(manifest)
        problem = f"has format {manifest['format']!r}, this version reads {FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"is damaged ({error})"
    raise ValueError(f"{file} {problem}; name another folder in {kind.key}, or remove this one.")


def check_identity(
    folder: Path,
    manifest: Mapping[str, Any],
    model: Mapping[str, str],
    settings: Mapping[str, Any],
    kind: Kind = CACHE,
) -> None:
    """ValueError unless the folder was filled with this model and these settings."""
    made_with = manifest["model"]
    for part, what in (("unet", "model"), ("encoders", "VAE or text encoders or precision")):
        if made_with[part] != model[part]:
            raise ValueError(
                f"{kind.key} {str(folder)!r} was prepared with another {what} "
                f"({made_with['name']}, {made_with[part][:12]}) than {model['name']} "
                f"({model[part][:12]}); name another folder, or remove this one and run "
                f"{kind.command}."
            )
    for key, value in settings.items():
        found = manifest["settings"].get(key)
        if found != value:
            raise ValueError(
                f"{kind.key} {str(folder)!r} was prepared with {key} {show_value(found)}, but the "
                f"configuration says {show_value(value)}; change that, name another folder, or "
                f"remove this one and run {kind.command}."
            )


def write_json(path: Path, content: object) -> None:
    """The file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_complete(folder: Path, kind: Kind = CACHE) -> dict[str, Any]:
    """The manifest; ValueError for a folder that is missing, or whose preparation was stopped."""
    manifest = read_manifest(folder, kind)
    if manifest is None:
        now = kind.again.replace(" again", "")
        raise ValueError(f"{kind.key} {str(folder)!r} holds nothing yet; {now}.")
    if not manifest["complete"]:
        raise ValueError(
            f"{kind.key} {str(folder)!r} is incomplete, its preparation was stopped; "
            f"{kind.again}, it goes on where it stopped."
        )
    return manifest


def open_cache(
    config: Config, components: Components
) -> tuple[ShardTable | None, dict[Size, ShardTable]]:
    """The prompts (None if the text is encoded online) and the pictures of each size.

    ValueError for a cache that is missing, incomplete, damaged, or of another model or settings.
    What was prepared is not compared with its sources here; see freshness.py.
    """
    tables = _open_tables(CACHE, config, components)
    prompts = tables.pop(PROMPTS, None)
    if not config.needs_real_images:
        return prompts, {}
    return prompts, {Size.parse(part): tables[part] for part in tables}


def open_pairs(config: Config, components: Components) -> ShardTable:
    """The teacher's pairs, which are of one size; ValueError as `open_cache`."""
    (table,) = _open_tables(PAIRS, config, components).values()
    return table


def _open_tables(kind: Kind, config: Config, components: Components) -> dict[str, ShardTable]:
    folder = kind.folder(config)
    assert folder is not None
    manifest = read_complete(folder, kind)
    settings = kind.settings_of(config)
    check_identity(folder, manifest, model_identity(components), settings, kind)
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["num_bytes"]:
            raise ValueError(f"{path} is missing or damaged; {kind.again}, which makes it anew.")
    return {part: ShardTable(segments) for part, segments in _segments(folder, manifest).items()}


def _segments(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[Segment]]:
    found: dict[str, list[Segment]] = {}
    for shard in manifest["shards"]:
        for part, count in shard["counts"].items():
            segment = Segment(path=folder / shard["file"], part=part, count=count)
            found.setdefault(part, []).append(segment)
    return found
