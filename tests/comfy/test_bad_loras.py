"""Hostile and damaged LoRA files: one sentence in the node, and the server goes on."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import graphs
import pytest
import torch
from comfy_server import ComfyServer, Run
from model_files import TinyModel
from safetensors.torch import load_file, save_file
from setups import Setup, latents

GOOD = {"timesteps": [999, 749, 499, 249]}


def loaded(server: ComfyServer, name: str, family: str = "from the file") -> Run:
    graph = Setup(lora=None)
    graph.add("PreviewAny", source=graph.load(name, family)[3])
    return server.run(graph.prompt)


def written(server: ComfyServer, name: str, recipe: str, version: str = "1") -> None:
    loras = server.base / "models" / "loras"
    metadata = {"dmd2.recipe": recipe, "dmd2.recipe_version": version}
    save_file(load_file(loras / graphs.LORA), loras / name, metadata)


def recipe(**changed: object) -> str:
    return json.dumps(GOOD | changed)


@pytest.fixture(scope="module")
def _server_goes_on(server: ComfyServer, model: TinyModel):
    yield
    graph = Setup()
    latents(server, graph, graph.sample(graph.sampler(), graph.sigmas()))


@pytest.mark.usefixtures("_server_goes_on")
@pytest.mark.parametrize(
    ("number", "text", "message"),
    [
        (1, "no json", "Expecting value"),
        (2, "[" * 100_000, "recipe is damaged"),
        (3, "[]", "not a JSON object with timesteps"),
        (4, recipe(timesteps="four"), "timesteps must be a list"),
        (5, recipe(timesteps=[999, "749"]), "timesteps has '749'"),
        (6, recipe(timesteps=[249, 999]), "timesteps must descend"),
        (7, recipe(timesteps=[1000, 5]), "outside the integers 0..999"),
        (8, recipe(timesteps=[]), "timesteps is empty"),
        (9, recipe(timesteps=list(range(2000, 0, -1))), "at most 1000 numbers"),
        (10, recipe(timesteps=[1e400, 3]), "noise levels between 0 and"),
        (11, recipe(strength=7), "strength is 7"),
        (12, recipe(strength=[1, 0]), "strength has 2 values for 3 re-injections"),
        (13, recipe(guidance=float("nan")), "guidance is nan"),
        (14, recipe(prediction="velocity"), "prediction 'velocity' is unknown"),
        (15, recipe(zero_terminal_snr="yes"), "zero_terminal_snr is 'yes'"),
        (16, recipe(conditioning_timestep=[399]), "conditioning_timestep has [399]"),
        (17, recipe(base_model="a\nb"), "use one short line of plain text"),
        (18, recipe(trained_with=3), "use a dictionary with text keys"),
        (19, recipe(__class__="os.system"), "unknown key '__class__'"),
        (20, recipe(trained_with={"x": "y" * 2_000_000}), "at most 1048576 characters"),
        (21, '{"timesteps": [' + "9" * 10_000 + "]}", "recipe is damaged"),
    ],
)
def test_a_malformed_recipe_is_one_sentence(
    server: ComfyServer, model: TinyModel, number: int, text: str, message: str
) -> None:
    name = f"malformed_{number}.safetensors"
    written(server, name, text)
    run = loaded(server, name)
    assert run.failed_node == "DMD2_LoadLoRA"
    assert message in run.error
    assert "the LoRA's recipe is damaged" in run.error
    assert len(run.error) < 600
    # Its weights are as good as any: a named family samples it.
    if number == 1:
        assert loaded(server, name, "DMD2, 4 steps").error is None


def test_a_newer_recipe_is_said(server: ComfyServer, model: TinyModel) -> None:
    written(server, "newer.safetensors", recipe(), version="2")
    assert "has version '2', this program reads '1'" in loaded(server, "newer.safetensors").error


def test_a_recipe_in_a_stock_loaders_lora_is_checked_too(
    server: ComfyServer, model: TinyModel
) -> None:
    written(server, "malformed.safetensors", "no json")
    graph = Setup(lora=None)
    stock = {"lora_name": "malformed.safetensors", "strength_model": 1.0}
    graph.model = graph.add("LoraLoaderModelOnly", model=graph.model, **stock)[0]
    made = graph.add("DMD2_Scheduler", **scheduler(graph))
    graph.add("PreviewAny", source=made[1])
    run = server.run(graph.prompt)
    assert run.failed_node == "DMD2_Scheduler"
    assert "recipe is damaged" in run.error
    graph.prompt[made.name]["inputs"]["steps"] = 4  # by hand it is not asked
    assert server.run(graph.prompt).error is None


def scheduler(graph: Setup) -> dict[str, object]:
    return {"model": graph.model, "steps": 0, "timesteps": "", "denoise": 1.0}


def not_safetensors(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 a renamed .ckpt")


def header_too_large(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 2**62) + b"{}")


def half_a_file(path: Path) -> None:
    content = (path.parent / graphs.LORA).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def metadata_of_wrong_type(path: Path) -> None:
    header = json.dumps({"__metadata__": {"dmd2.recipe": {"timesteps": [999]}}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)


def no_tensors(path: Path) -> None:
    save_file({}, path)


def mismatched_halves(path: Path) -> None:
    tensors = load_file(path.parent / graphs.LORA)
    name = next(name for name in tensors if name.endswith("lora_up.weight"))
    tensors[name] = torch.cat([tensors[name], tensors[name]], dim=1)
    save_file(tensors, path)


@pytest.mark.usefixtures("_server_goes_on")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (not_safetensors, "cannot be read"),
        (header_too_large, "cannot be read"),
        (half_a_file, "cannot be read"),
        (metadata_of_wrong_type, "cannot be read"),
        (no_tensors, "none of the 0 modules"),
        (mismatched_halves, "is damaged: the halves of its module"),
    ],
)
def test_a_damaged_file_is_one_sentence(
    server: ComfyServer, model: TinyModel, make, message: str
) -> None:
    name = f"{make.__name__}.safetensors"
    make(server.base / "models" / "loras" / name)
    run = loaded(server, name)
    assert run.failed_node == "DMD2_LoadLoRA"
    assert message in run.error
    assert name in run.error


def test_other_formats_are_not_offered(server: ComfyServer, model: TinyModel) -> None:
    (server.base / "models" / "loras" / "pickle.pt").write_bytes(b"\x80\x04.")
    info = server.get("/object_info/DMD2_LoadLoRA")["DMD2_LoadLoRA"]
    kind, options = info["input"]["required"]["lora_name"]
    names = options["options"] if kind == "COMBO" else kind
    assert graphs.LORA in names
    assert "pickle.pt" not in names


def test_text_encoder_modules_need_clip(server: ComfyServer, model: TinyModel) -> None:
    loras = server.base / "models" / "loras"
    width = 32
    text = {
        f"lora_te1_text_model_encoder_layers_0_self_attn_q_proj.{end}": torch.full(shape, 0.1)
        for end, shape in (("lora_down.weight", (1, width)), ("lora_up.weight", (width, 1)))
    }
    save_file(load_file(loras / graphs.LORA) | text, loras / "with_text.safetensors")
    save_file(text, loras / "text_only.safetensors")
    assert "connect clip" in loaded(server, "text_only.safetensors").error
    graph = Setup(lora=None)
    clip = graph.clip
    reports = [
        graph.add("PreviewAny", source=graph.load("with_text.safetensors", **inputs)[3])
        for inputs in ({}, {"clip": clip})
    ]
    run = server.run(graph.prompt)
    without, with_clip = (run.outputs[node.name]["text"][0] for node in reports)
    total = model.num_modules + 1
    assert f"{total - 1} of {total} modules applied" in without
    assert "Not applied: 1 modules for the text encoders: connect clip" in without
    assert f"{total} of {total} modules applied" in with_clip
