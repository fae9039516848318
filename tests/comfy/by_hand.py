"""Starts a ComfyUI to try by hand: this pack, the embedded tiny model, the shipped workflows.

    python tests/comfy/by_hand.py --lora demo_output/dmd2_demo_4step.safetensors

`make comfyui` runs it. ComfyUI is the one at COMFYUI_PATH, or the one that the tests download; it
listens on 127.0.0.1 only, and everything it writes goes below --folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import base_folder
import comfy_host
import tiny_workflow
import workflow_set
from comfy_server import ComfyServer
from model_files import write_controlnet
from safetensors.torch import load_file, save_file
from tiny_pictures import write_pictures

from dmd2_core import Recipe
from train_lora.demo import teacher
from train_lora.models.saving import save_single_file

PORT = 8188
ONE_STEP = Recipe(timesteps=(999,), conditioning_timestep=399)


def write_files(base: Path, lora: Path) -> None:
    """The tiny model's files below `base`, under the names that the workflows use."""
    models = base / "models"
    checkpoint = models / "checkpoints" / workflow_set.CHECKPOINT
    save_single_file(teacher.load_teacher(), checkpoint, overwrite=True)
    shutil.copyfile(lora, models / "loras" / workflow_set.LORA)
    one_step = models / "loras" / workflow_set.ONE_STEP_LORA
    save_file(load_file(lora), one_step, ONE_STEP.to_metadata())
    write_controlnet(checkpoint, models / "controlnet" / workflow_set.CONTROLNET)
    write_pictures(base / "input")


def write_workflows(server: ComfyServer) -> None:
    """The shipped workflows in the tiny model's size, where the page's list finds them."""
    object_info = server.get("/object_info")
    folder = server.base / "user" / "default" / "workflows"
    for file in sorted((base_folder.REPOSITORY / "workflows").glob("*.json")):
        small = tiny_workflow.tiny(file, object_info)
        (folder / file.name).write_text(json.dumps(small), encoding="utf-8")


def prepared_server(
    base: Path, lora: Path, port: int, before: Callable[[ComfyServer], None] | None = None
) -> ComfyServer:
    """A running server with everything in place; to be stopped by the caller. `before`
    is called before the workflows are put in place."""
    base_folder.make_base(base)
    write_files(base, lora)
    custom_nodes = tuple(base_folder.CUSTOM_NODES)
    server = ComfyServer(
        comfyui=comfy_host.comfyui_folder(), base=base, custom_nodes=custom_nodes, port=port
    )
    server.start()
    if before is not None:
        before(server)
    server.post("/settings", {"Comfy.TutorialCompleted": True})  # no templates over the page
    write_workflows(server)
    return server


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=Path("comfyui_base"), help="for its files")
    parser.add_argument("--lora", type=Path, required=True, help="a LoRA of the embedded teacher")
    parser.add_argument("--port", type=int, default=PORT, help=f"default {PORT}")
    given = parser.parse_args()
    if not given.lora.is_file():
        parser.error(f"--lora is {given.lora}, which does not exist: run `make demo` first")
    return given


def _end(*_: object) -> None:
    raise KeyboardInterrupt


def main() -> None:
    chosen = options()
    print("Starting ComfyUI ...", flush=True)
    signal.signal(signal.SIGTERM, _end)  # else ComfyUI would outlive this process
    server = prepared_server(chosen.folder.resolve(), chosen.lora, chosen.port)
    print(
        f"ComfyUI is at http://127.0.0.1:{server.port} (Ctrl-C ends it, its log is "
        f"{server.log_file}).\nThe workflows are in its list (press w). The model is the tiny one "
        f"of the demo: 128 x 128, captions such as {tiny_workflow.CAPTION!r}.\nThe one-step "
        "LoRA and the ControlNet are stand-ins, there to see the graphs run.",
        flush=True,
    )
    try:
        server.wait()
    except KeyboardInterrupt:
        pass
    finally:
        server.stop()


if __name__ == "__main__":
    main()
