"""The folder that `dmd2 prepare` fills: shards, a manifest that says of what, and a report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config, show_value
from ..models.components import Components
from ..models.fingerprint import weights_hash
from .encode import PROMPTS
from .sizes import Size
from .store import Segment, ShardTable

MANIFEST, REPORT = "manifest.json", "report.json"
FORMAT = 1
PICTURES = "pictures"
KEY = "data.cache"
AGAIN = "run dmd2 prepare again with this configuration"


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


def _of_prompts(config: Config) -> dict[str, Any]:
    data = config.data
    return {
        "data.prompts": _name(data.prompts),
        "data.prompt_column": data.prompt_column,
        "data.split": data.split,
    }


def _name(source: str | None) -> str | None:
    return None if source is None else Path(source).name


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


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What the cache is; None where the folder is missing or empty.

    ValueError for a folder that holds something else, which is never written to.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{KEY} is {str(folder)!r}, which is a file; name a folder.")
    file = folder / MANIFEST
    if not file.is_file():
        if folder.is_dir() and any(folder.iterdir()):
            raise ValueError(
                f"{KEY} is {str(folder)!r}, a folder that is not empty and no cache; name another."
            )
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] == FORMAT:
            return dict(manifest)
        problem = f"has format {manifest['format']!r}, this version reads {FORMAT}"
    except (ValueError, KeyError, TypeError) as error:
        problem = f"is damaged ({error})"
    raise ValueError(f"{file} {problem}; name another folder in {KEY}, or remove this one.")


def check_identity(
    folder: Path, manifest: Mapping[str, Any], model: Mapping[str, str], settings: Mapping[str, Any]
) -> None:
    """ValueError unless the cache was made with this model and these settings."""
    made_with = manifest["model"]
    for part, what in (("unet", "model"), ("encoders", "VAE or text encoders or precision")):
        if made_with[part] != model[part]:
            raise ValueError(
                f"{KEY} {str(folder)!r} was prepared with another {what} ({made_with['name']}, "
                f"{made_with[part][:12]}) than {model['name']} ({model[part][:12]}); name another "
                "folder, or remove this one and run dmd2 prepare."
            )
    for key, value in settings.items():
        found = manifest["settings"].get(key)
        if found != value:
            raise ValueError(
                f"{KEY} {str(folder)!r} was prepared with {key} {show_value(found)}, but the "
                f"configuration says {show_value(value)}; change that, name another folder, or "
                "remove this one and run dmd2 prepare."
            )


def write_json(path: Path, content: object) -> None:
    """The file, whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(path)


def read_complete(folder: Path) -> dict[str, Any]:
    """The manifest; ValueError for a cache that is missing, or whose preparation was stopped."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"{KEY} {str(folder)!r} holds nothing yet; {AGAIN.replace(' again', '')}.")
    if not manifest["complete"]:
        raise ValueError(
            f"{KEY} {str(folder)!r} is incomplete, its preparation was stopped; {AGAIN}, "
            "it goes on where it stopped."
        )
    return manifest


def open_cache(
    config: Config, components: Components
) -> tuple[ShardTable | None, dict[Size, ShardTable]]:
    """The prompts (None if the text is encoded online) and the pictures of each size.

    ValueError for a cache that is missing, incomplete, damaged, or of another model or settings.
    What was prepared is not compared with its sources here; see freshness.py.
    """
    assert config.data.cache is not None
    folder = Path(config.data.cache)
    manifest = read_complete(folder)
    check_identity(folder, manifest, model_identity(components), settings_of(config))
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if not path.is_file() or path.stat().st_size != shard["num_bytes"]:
            raise ValueError(f"{path} is missing or damaged; {AGAIN}, which makes it anew.")
    tables = {part: ShardTable(segments) for part, segments in _segments(folder, manifest).items()}
    prompts = tables.pop(PROMPTS, None)
    if not config.needs_real_images:
        return prompts, {}
    return prompts, {Size.parse(part): tables[part] for part in tables}


def _segments(folder: Path, manifest: Mapping[str, Any]) -> dict[str, list[Segment]]:
    found: dict[str, list[Segment]] = {}
    for shard in manifest["shards"]:
        for part, count in shard["counts"].items():
            segment = Segment(path=folder / shard["file"], part=part, count=count)
            found.setdefault(part, []).append(segment)
    return found
