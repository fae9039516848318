"""Builds workflow files as the page saves them, from the nodes' own definitions.

Widgets take their defaults and their order from the server's /object_info, so a changed schema
shows up as a changed file (test_workflow_files.py), not as a shifted widget.
"""

from __future__ import annotations

import json
from typing import Any

from graphs import widgets_of

COLUMN_PX, GAP_PX = 70, 60
TITLE_PX, SLOT_PX, WIDGET_PX, TEXT_PX, CHART_PX = 16, 20, 24, 90, 110
REPORT_PX = 74
EXTRA_PX = {"SaveImage": 400, "PreviewImage": 320, "LoadImage": 340, "PreviewAny": 150}
EXTRA_PX |= {"DMD2_Scheduler": CHART_PX, "DMD2_Sample": CHART_PX + REPORT_PX}
EXTRA_PX |= {"DMD2_LoadLoRA": REPORT_PX, "DMD2_KSamplerPatch": REPORT_PX}
WIDTH_PX = {"SaveImage": 420, "MarkdownNote": 420}

Link = tuple["Node", str]
"""A node and the name of its output."""


class Node:
    """One node of a workflow; `node["model"]` names an output for a link."""

    def __init__(self, data: dict[str, Any]) -> None:
        self.data = data

    def __getitem__(self, output: str) -> Link:
        return self, output


class Workflow:
    """A workflow file under construction: nodes stack up in columns from left to right."""

    def __init__(self, object_info: dict[str, Any], *, widget_slots: bool = False) -> None:
        """`widget_slots`: widgets are listed as inputs too, which a subgraph's links need."""
        self._info = object_info
        self._widget_slots = widget_slots
        self._nodes: list[dict[str, Any]] = []
        self._links: list[list[Any]] = []
        self._x_px, self._y_px, self._width_px = 0, 0, 0

    def column(self, width_px: int = 340) -> None:
        """What is added from now on goes into a new column to the right."""
        self._x_px += self._width_px + (COLUMN_PX if self._nodes else 0)
        self._y_px, self._width_px = 0, width_px

    def note(self, text: str, height_px: int) -> None:
        """A Markdown note."""
        self._place("MarkdownNote", "Read me", [], [], [text.strip()], height_px)

    def add(self, kind: str, title: str | None = None, **given: Any) -> Node:
        """A node with links (`model=loader["MODEL"]`) and widgets not at their defaults."""
        info = self._info[kind]
        options = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        widgets = dict(widgets_of(info))
        inputs = [
            {"name": name, "type": _type(spec)}
            | ({"shape": 7} if name in info["input"].get("optional", {}) else {})
            for name, spec in options.items()
            if name not in widgets
        ]
        if self._widget_slots:
            inputs += [
                {"name": name, "type": _type(options[name]), "widget": {"name": name}}
                for name in widgets
            ]
        values, texts = [], 0
        for name, control in widgets.items():
            value = given.pop(name) if name in given else _default(options[name])
            values += [value, "randomize" if name in ("seed", "noise_seed") else "fixed"][
                : 1 + control
            ]
            texts += bool(_settings(options[name]).get("multiline"))
        outputs = [
            {"name": name, "type": type_, "links": []}
            for name, type_ in zip(info["output_name"], info["output"], strict=True)
        ]
        sockets = max(len(options) - len(widgets), len(outputs))
        height_px = TITLE_PX + SLOT_PX * sockets + WIDGET_PX * len(values)
        height_px += TEXT_PX * texts + EXTRA_PX.get(kind, 0)
        node = self._place(kind, title, inputs, outputs, values, height_px)
        for name, (source, output) in given.items():
            self._connect(source.data, output, node, name)
        return Node(node)

    def _place(
        self,
        kind: str,
        title: str | None,
        inputs: list[dict[str, Any]],
        outputs: list[dict[str, Any]],
        values: list[Any],
        height_px: int,
    ) -> dict[str, Any]:
        self._width_px = max(self._width_px, WIDTH_PX.get(kind, 0))
        node: dict[str, Any] = {
            "id": len(self._nodes) + 1,
            "type": kind,
            "pos": [self._x_px, self._y_px],
            "size": [self._width_px, height_px],
            "flags": {},
            "order": len(self._nodes),
            "mode": 0,
            "inputs": [{**socket, "link": None} for socket in inputs],
            "outputs": outputs,
            "properties": {"Node name for S&R": kind},
            "widgets_values": values,
        }
        if title is not None:
            node["title"] = title
        self._y_px += height_px + GAP_PX
        self._nodes.append(node)
        return node

    def _connect(
        self, source: dict[str, Any], output: str, target: dict[str, Any], name: str
    ) -> None:
        names = [socket["name"] for socket in source["outputs"]]
        slot = names.index(output)
        [place] = [i for i, socket in enumerate(target["inputs"]) if socket["name"] == name]
        number = len(self._links) + 1
        kind = source["outputs"][slot]["type"]
        self._links.append([number, source["id"], slot, target["id"], place, kind])
        source["outputs"][slot]["links"].append(number)
        target["inputs"][place]["link"] = number

    def data(self) -> dict[str, Any]:
        """The file's content."""
        return {
            "last_node_id": len(self._nodes),
            "last_link_id": len(self._links),
            "nodes": self._nodes,
            "links": self._links,
            "groups": [],
            "config": {},
            "extra": {"ds": {"scale": 0.7, "offset": [40, 80]}},
            "version": 0.4,
        }


def text_of(workflow: dict[str, Any]) -> str:
    """A workflow's file: JSON, one node or link a line."""
    parts = []
    for key, value in workflow.items():
        if key in ("nodes", "links"):
            lines = ",\n    ".join(json.dumps(item, ensure_ascii=False) for item in value)
            parts.append(f'  "{key}": [\n    {lines}\n  ]')
        else:
            parts.append(f'  "{key}": {json.dumps(value)}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _settings(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _type(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def _default(spec: list[Any]) -> Any:
    settings = _settings(spec)
    if "default" in settings:
        return settings["default"]
    choices = spec[0] if isinstance(spec[0], list) else settings.get("options")
    return choices[0] if choices else ""
