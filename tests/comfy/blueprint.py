"""The subgraph blueprint that the pack ships: text to image as one node.

A blueprint is a workflow file with a single node, whose type is the subgraph defined beside it.
"""

from __future__ import annotations

import uuid
from typing import Any

import workflow_set
from workflow_builder import Node, Workflow

NAME = "Text to Image (DMD2)"
"""The file's name, which is what the page shows."""
DESCRIPTION = "SDXL in 4 steps with a DMD2 LoRA, with a negative prompt at cfg 1."
ALIASES = ["dmd2", "few step", "4 steps", "fast sdxl"]
CATEGORY = "Image generation and editing/Text to image"
INPUT_ID, OUTPUT_ID = -10, -20
SLOT_PX = 20
NAMESPACE = uuid.UUID("6f1f7a8e-6d0b-4d6e-9a58-0d2f5b9d6c11")
"""Ids are derived from it, so that the file is the same each time."""


def build(object_info: dict[str, Any]) -> dict[str, Any]:
    """The blueprint's file content."""
    flow = Workflow(object_info, widget_slots=True)
    flow.column(340)
    checkpoint, loader = workflow_set.models(flow)
    flow.column(340)
    positive = workflow_set.prompt(flow, checkpoint["CLIP"])
    negative = workflow_set.negative_prompt(flow, checkpoint["CLIP"])
    empty = workflow_set.empty(flow)
    flow.column(340)
    sampled = flow.add(
        "DMD2_Sample",
        model=loader["model"],
        positive=positive["CONDITIONING"],
        negative=negative["CONDITIONING"],
        latent_image=empty["LATENT"],
    )
    decoded = flow.add("VAEDecode", samples=sampled["latent"], vae=checkpoint["VAE"])
    shown = [
        (positive, "text", "prompt"),
        (negative, "text", "negative prompt"),
        (empty, "width", "width"),
        (empty, "height", "height"),
        (sampled, "seed", "seed"),
        (checkpoint, "ckpt_name", "checkpoint"),
        (loader, "lora_name", "LoRA"),
        (loader, "family", "family"),
    ]
    return _wrapped(flow.data(), shown, decoded)


def _wrapped(
    inner: dict[str, Any], shown: list[tuple[Node, str, str]], output: Node
) -> dict[str, Any]:
    identity = str(uuid.uuid5(NAMESPACE, NAME))
    links = [
        {
            "id": number,
            "origin_id": origin,
            "origin_slot": origin_slot,
            "target_id": target,
            "target_slot": target_slot,
            "type": kind,
        }
        for number, origin, origin_slot, target, target_slot, kind in inner["links"]
    ]
    height_px = SLOT_PX * (len(shown) + 2)
    right_px = max(node["pos"][0] + node["size"][0] for node in inner["nodes"])
    inputs = [
        _shown_input(place, node.data, widget, label, links)
        for place, (node, widget, label) in enumerate(shown)
    ]
    picture = {"name": "IMAGE", "type": "IMAGE"}
    number = len(links) + 1
    links.append(
        {
            **{"id": number, "origin_id": output.data["id"], "origin_slot": 0},
            **{"target_id": OUTPUT_ID, "target_slot": 0, "type": "IMAGE"},
        }
    )
    output.data["outputs"][0]["links"].append(number)
    subgraph = {
        "id": identity,
        "version": 1,
        "state": {
            "lastGroupId": 0,
            "lastNodeId": inner["last_node_id"],
            "lastLinkId": number,
            "lastRerouteId": 0,
        },
        "revision": 0,
        "config": {},
        "name": NAME,
        "inputNode": {"id": INPUT_ID, "bounding": [-220, 0, 150, height_px]},
        "outputNode": {"id": OUTPUT_ID, "bounding": [right_px + 70, 0, 120, 3 * SLOT_PX]},
        "inputs": inputs,
        "outputs": [
            {"id": _id("output"), **picture, "linkIds": [number], "pos": [right_px + 90, SLOT_PX]}
        ],
        "widgets": [],
        "nodes": inner["nodes"],
        "groups": [],
        "links": links,
        "extra": {},
        "category": CATEGORY,
        "description": DESCRIPTION,
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [_outer_node(identity, inputs, shown, picture)],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {"BlueprintDescription": DESCRIPTION, "BlueprintSearchAliases": ALIASES},
    }


def _id(name: str) -> str:
    return str(uuid.uuid5(NAMESPACE, name))


def _shown_input(
    place: int, node: dict[str, Any], widget: str, label: str, links: list[dict[str, Any]]
) -> dict[str, Any]:
    """An input of the subgraph, linked to a widget of an inner node."""
    [slot] = [i for i, socket in enumerate(node["inputs"]) if socket["name"] == widget]
    socket = node["inputs"][slot]
    number = len(links) + 1
    links.append(
        {
            **{"id": number, "origin_id": INPUT_ID, "origin_slot": place},
            **{"target_id": node["id"], "target_slot": slot, "type": socket["type"]},
        }
    )
    socket["link"] = number
    pos = [-90, SLOT_PX * (place + 1)]
    shown = {"name": label, "type": socket["type"], "label": label, "linkIds": [number]}
    return {"id": _id(label), **shown, "pos": pos}


def _outer_node(
    identity: str,
    inputs: list[dict[str, Any]],
    shown: list[tuple[Node, str, str]],
    picture: dict[str, Any],
) -> dict[str, Any]:
    """The one node of the file."""
    sockets = [
        {
            **{"name": one["name"], "label": one["label"], "type": one["type"]},
            **{"widget": {"name": one["name"]}, "link": None},
        }
        for one in inputs
    ]
    widgets = [[str(node.data["id"]), widget] for node, widget, _ in shown]
    return {
        "id": 1,
        "type": identity,
        "pos": [0, 0],
        "size": [400, 420],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": sockets,
        "outputs": [{**picture, "links": []}],
        "properties": {"proxyWidgets": widgets},
        "widgets_values": [],
        "title": NAME,
    }
