"""Writes workflows/, subgraphs/, locales/en, thumbnails and the README's picture anew.

    python tests/comfy/make_workflows.py --lora demo_output/dmd2_demo_4step.safetensors

`make workflows` runs it, after a node's inputs or workflow_set.py have changed. Each workflow runs
in a real ComfyUI on the tiny model and is photographed, with its result, in a headless Chromium.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import base_folder
import blueprint
import comfy_page
import locale_files
import workflow_set
from browser import Page
from by_hand import prepared_server
from comfy_server import ComfyServer
from PIL import Image
from workflow_builder import text_of

WORKFLOWS = base_folder.REPOSITORY / "workflows"
SUBGRAPHS = base_folder.REPOSITORY / "subgraphs"
README_WORKFLOW = "dmd2_text_to_image"
README_PICTURE = base_folder.REPOSITORY / "docs" / "workflow.jpg"
PAGE_PX, THUMBNAIL_PX = (1760, 1000), (720, 480)
QUALITY = 85


def write_files(server: ComfyServer) -> None:
    """Workflows, blueprint and English texts from the definitions that this server gives."""
    object_info = server.get("/object_info")
    for name in workflow_set.WORKFLOWS:
        text = text_of(workflow_set.build(name, object_info))
        (WORKFLOWS / f"{name}.json").write_text(text, encoding="utf-8")
    texts = locale_files.text_of(locale_files.english(object_info))
    (locale_files.LOCALES / "en" / "nodeDefs.json").write_text(texts, encoding="utf-8")
    text = text_of(blueprint.build(object_info))
    (SUBGRAPHS / f"{blueprint.NAME}.json").write_text(text, encoding="utf-8")


def opened_and_run(server: ComfyServer, page: Page, name: str) -> None:
    """The page shows the workflow in the tiny model's size, after a run."""
    saved = server.base / "user" / "default" / "workflows" / f"{name}.json"
    comfy_page.open_workflow(page, json.loads(saved.read_text(encoding="utf-8")), name)
    comfy_page.run_workflow(page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA of the embedded teacher")
    lora = parser.parse_args().lora
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        server = prepared_server(folder / "base", lora, port=0, before=write_files)
        try:
            page = Page(folder / "profile", *PAGE_PX)
            try:
                comfy_page.start(page, server)
                for name in workflow_set.WORKFLOWS:
                    shot = folder / f"{name}.png"
                    opened_and_run(server, page, name)
                    comfy_page.photograph(page, shot)
                    picture = Image.open(shot).convert("RGB")
                    if name == README_WORKFLOW:
                        picture.save(README_PICTURE, quality=QUALITY)
                    picture.thumbnail(THUMBNAIL_PX, Image.Resampling.LANCZOS)
                    picture.save(WORKFLOWS / f"{name}.jpg", quality=QUALITY)
                    print(name, comfy_page.problems(page) or "", flush=True)
            finally:
                page.close()
        finally:
            server.stop()


if __name__ == "__main__":
    main()
