"""A shipped workflow as the tiny model can run it: its file names, its size, captions it knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import workflow_set
from graphs import widgets_of

SIZE_PX = 128
MASKED_IMAGE = "example_masked.png"
CAPTION = "a large red star on a striped blue background, centre"
SECOND_CAPTION = "a small yellow heart on a dotted green background, left"
NEGATIVE = "a circle on a plain background"
WIDGETS: dict[tuple[str, Any], Any] = {
    ("width", workflow_set.SIZE_PX): SIZE_PX,
    ("height", workflow_set.SIZE_PX): SIZE_PX,
    ("text", workflow_set.PROMPT): CAPTION,
    ("text", workflow_set.NEGATIVE): NEGATIVE,
    ("prompts", workflow_set.PROMPTS): f"{CAPTION}\n{SECOND_CAPTION}",
}
"""(widget, its value in the file) -> the tiny model's value."""
PICTURES = {"dmd2_inpainting": {workflow_set.IMAGE: MASKED_IMAGE}}
"""Name of the workflow -> pictures that it gets instead."""


def tiny(
    file: Path, object_info: dict[str, Any], names: dict[str, str] | None = None
) -> dict[str, Any]:
    """The workflow in `file` for the tiny model; `names` replaces names of model files."""
    workflow = json.loads(file.read_text(encoding="utf-8"))
    replaced = {**PICTURES.get(file.stem, {}), **(names or {})}
    for nodes in (workflow["nodes"], *_inner_nodes(workflow)):
        for node in nodes:
            if node["type"] in object_info:
                _shrink(node, object_info[node["type"]], replaced)
    return workflow


def _inner_nodes(workflow: dict[str, Any]) -> list[list[dict[str, Any]]]:
    return [part["nodes"] for part in workflow.get("definitions", {}).get("subgraphs", ())]


def _shrink(node: dict[str, Any], info: dict[str, Any], names: dict[str, str]) -> None:
    values, place = node["widgets_values"], 0
    for widget, control in widgets_of(info):
        value = values[place]
        if isinstance(value, str | int):
            values[place] = WIDGETS.get((widget, value), names.get(value, value))
        if control:
            values[place + 1] = "fixed"
        place += 1 + control
