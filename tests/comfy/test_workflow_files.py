"""The workflows that the pack ships: built from the nodes' definitions, explained, and run."""

from __future__ import annotations

import io
import json
from typing import Any

import blueprint
import graphs
import model_files
import pytest
import tiny_workflow
import workflow_set
from base_folder import REPOSITORY
from comfy_server import ComfyServer
from PIL import Image
from tiny_pictures import write_pictures
from workflow_builder import text_of

WORKFLOWS = REPOSITORY / "workflows"
SUBGRAPH = REPOSITORY / "subgraphs" / f"{blueprint.NAME}.json"
NAMES = sorted(workflow_set.WORKFLOWS)
TINY_NAMES = {
    workflow_set.ONE_STEP_LORA: model_files.ONE_STEP_LORA,
    workflow_set.CONTROLNET: model_files.CONTROLNET,
}
FOLDERS = {"ckpt_name": "checkpoints", "lora_name": "loras", "control_net_name": "controlnet"}
SIZES_PX = {"dmd2_hires_fix": (192, 192), "dmd2_compare": None}
"""Of the picture that comes out; else tiny_workflow.SIZE_PX squared, None: whatever."""
MAX_THUMBNAIL_BYTES = 120_000
FEW_TEACHER_STEPS = 4


@pytest.fixture(scope="module")
def object_info(server: ComfyServer) -> dict[str, Any]:
    return server.get("/object_info")


@pytest.fixture(scope="module")
def _files(server: ComfyServer, model: model_files.TinyModel) -> None:
    """The tiny model's files and pictures are in place."""
    write_pictures(server.base / "input")


def shipped(name: str) -> dict[str, Any]:
    return json.loads((WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))


def test_every_file_has_a_builder_and_a_thumbnail() -> None:
    assert sorted(path.stem for path in WORKFLOWS.glob("*.json")) == NAMES
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_its_builder_makes(name: str, object_info: dict[str, Any]) -> None:
    """After a change of a node or of workflow_set.py: `make workflows`."""
    built = text_of(workflow_set.build(name, object_info))
    assert (WORKFLOWS / f"{name}.json").read_text(encoding="utf-8") == built


def test_the_blueprint_is_what_its_builder_makes(object_info: dict[str, Any]) -> None:
    assert SUBGRAPH.read_text(encoding="utf-8") == text_of(blueprint.build(object_info))


@pytest.mark.parametrize("name", NAMES)
def test_a_note_names_the_files_and_their_folders(name: str, object_info: dict[str, Any]) -> None:
    workflow = shipped(name)
    [note] = [node for node in workflow["nodes"] if node["type"] == "MarkdownNote"]
    [text] = note["widgets_values"]
    used = {
        (widget, value)
        for node in graphs.api_format(workflow, object_info).values()
        for widget, value in node["inputs"].items()
        if widget in FOLDERS
    }
    assert len(used) >= 2
    for widget, value in used:
        assert f"**{value}**" in text, (name, value)
        assert f"**models/{FOLDERS[widget]}**" in text, (name, widget)


@pytest.mark.parametrize("name", NAMES)
def test_a_thumbnail_is_small_and_shows_something(name: str) -> None:
    file = WORKFLOWS / f"{name}.jpg"
    assert file.stat().st_size <= MAX_THUMBNAIL_BYTES
    with Image.open(file) as picture:
        assert picture.width == 720
        assert len(picture.convert("L").getcolors(256)) > 100


@pytest.mark.usefixtures("_files")
@pytest.mark.parametrize("name", NAMES)
def test_a_workflow_runs(name: str, server: ComfyServer, object_info: dict[str, Any]) -> None:
    small = tiny_workflow.tiny(WORKFLOWS / f"{name}.json", object_info, TINY_NAMES)
    prompt = graphs.api_format(small, object_info)
    for node in prompt.values():
        if "teacher_steps" in node["inputs"]:
            node["inputs"]["teacher_steps"] = FEW_TEACHER_STEPS
    run = server.run(prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    pictures = [file for output in run.outputs.values() for file in output.get("images", ())]
    assert len(pictures) == 1
    with Image.open(io.BytesIO(server.view(pictures[0]))) as picture:
        side_px = tiny_workflow.SIZE_PX
        expected = SIZES_PX.get(name, (side_px, side_px))
        assert expected is None or picture.size == expected
        lowest, highest = picture.convert("L").getextrema()
        assert highest - lowest > 50
    if name == "dmd2_inpainting":
        assert_outside_of_the_mask_is_kept(server, pictures[0])


def assert_outside_of_the_mask_is_kept(server: ComfyServer, file: dict[str, str]) -> None:
    original = Image.open(server.base / "input" / tiny_workflow.MASKED_IMAGE)
    result = Image.open(io.BytesIO(server.view(file))).convert("RGB")
    before, after = original.convert("RGB").load(), result.load()
    alpha = original.getchannel("A").load()
    places = [(x, y) for x in range(original.width) for y in range(original.height)]
    kept = [place for place in places if alpha[place] == 255]
    assert all(before[place] == after[place] for place in kept)
    inside = [place for place in places if alpha[place] == 0]
    changed = sum(before[place] != after[place] for place in inside)
    assert changed > 0.9 * len(inside)


def test_the_page_lists_workflows_and_blueprint(server: ComfyServer) -> None:
    assert sorted(server.get("/workflow_templates")["dmd2"]) == NAMES
    for name in NAMES:
        served = server.get_bytes(f"/api/workflow_templates/dmd2/{name}.jpg")
        assert served == (WORKFLOWS / f"{name}.jpg").read_bytes()
    found = {entry["name"]: key for key, entry in server.get("/global_subgraphs").items()}
    entry = server.get(f"/global_subgraphs/{found[blueprint.NAME]}")
    assert entry["info"] == {"node_pack": "custom_nodes.dmd2"}
    assert entry["data"] == SUBGRAPH.read_text(encoding="utf-8")
