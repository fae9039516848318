"""locales/en/nodeDefs.json, made of the nodes' own texts: what a translation has to cover."""

from __future__ import annotations

import json
from typing import Any

from base_folder import REPOSITORY

LOCALES = REPOSITORY / "locales"


def english(object_info: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's form: node id -> its name and description, inputs by name, outputs by place."""
    return {name: _texts(info) for name, info in sorted(object_info.items()) if name[:5] == "DMD2_"}


def _texts(info: dict[str, Any]) -> dict[str, Any]:
    specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
    outputs = zip(info["output_name"], info["output_tooltips"], strict=True)
    return {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {
            name: {"name": name, "tooltip": spec[1]["tooltip"]} for name, spec in specs.items()
        },
        "outputs": {
            str(place): {"name": name, "tooltip": tooltip}
            for place, (name, tooltip) in enumerate(outputs)
        },
    }


def text_of(texts: dict[str, Any]) -> str:
    return json.dumps(texts, ensure_ascii=False, indent=2) + "\n"
