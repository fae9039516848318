"""A shipped workflow as the tiny model can run it: its file names, its size, captions it knows."""

from __future__ import annotations

import copy
from typing import Any

import workflow_set
from graphs import widgets_of

SIZE_PX = 128
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


def tiny(
    workflow: dict[str, Any], object_info: dict[str, Any], names: dict[str, str] | None = None
) -> dict[str, Any]:
    """A copy of `workflow` for the tiny model; `names` replaces names of model files."""
    small = copy.deepcopy(workflow)
    for node in small["nodes"]:
        if node["type"] not in object_info:
            continue
        values, place = node["widgets_values"], 0
        for widget, control in widgets_of(object_info[node["type"]]):
            value = values[place]
            if isinstance(value, str | int):
                values[place] = WIDGETS.get((widget, value), (names or {}).get(value, value))
            if control:
                values[place + 1] = "fixed"
            place += 1 + control
    return small
