"""DMD2 Merge Check and `dmd2 merge` in a running ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import graphs
import model_files
import pytest
from comfy_server import ComfyServer
from model_files import TinyModel
from safetensors.torch import load_file, save_file
from setups import Setup, latents

from train_lora.merge import merge

MERGED, SILENT, NAMED = "merged.safetensors", "silent.safetensors", "named.safetensors"


@pytest.fixture(scope="module", autouse=True)
def _checkpoints(server: ComfyServer, model: TinyModel) -> None:
    """The LoRA merged: with a recipe, without a word, and with nothing but words."""
    models = server.base / "models"
    base, lora = models / "checkpoints" / graphs.CHECKPOINT, models / "loras" / graphs.LORA
    merge(base, lora, models / "checkpoints" / MERGED)
    tensors = load_file(models / "checkpoints" / MERGED)
    save_file(tensors, models / "checkpoints" / SILENT)
    graph = {"4": {"class_type": "LoraLoader", "inputs": {"lora_name": "sdxl_lightning_4step.s"}}}
    save_file(load_file(base), models / "checkpoints" / NAMED, {"prompt": json.dumps(graph)})


def checked(server: ComfyServer, loaded: str, **widgets: Any) -> tuple[str | None, str | None]:
    """The report and the error for a checkpoint."""
    graph = Setup(lora=None, checkpoint=loaded)
    defaults = {"checkpoint": "not named", "lora_name": "none", "refuse": True}
    node = graph.add("DMD2_MergeCheck", model=graph.model, **defaults | widgets)
    shown = graph.add("PreviewAny", source=node[2])
    run = server.run(graph.prompt)
    text = run.outputs.get(shown.name, {}).get("text", [None])[0]
    return text, run.error


def test_a_merged_checkpoint_paints_what_the_lora_does(
    server: ComfyServer, model: TinyModel
) -> None:
    """Without naming anything but the checkpoint: its recipe reaches the nodes."""
    graph = Setup(lora=None, checkpoint=MERGED)
    widgets = {"checkpoint": MERGED, "lora_name": "none", "refuse": True}
    graph.model = graph.add("DMD2_MergeCheck", model=graph.model, **widgets)[0]
    baked = graph.sample(graph.sampler(), graph.sigmas())
    other = Setup()
    loaded = other.sample(other.sampler(), other.sigmas())
    plain = Setup(lora=None)
    base = plain.sample(plain.sampler(), plain.sigmas())
    [baked], [loaded], [base] = (
        latents(server, setup, made)
        for setup, made in ((graph, baked), (other, loaded), (plain, base))
    )
    # The checkpoint is float16: the sum is rounded once, to about 5e-4 of each weight.
    assert (baked - loaded).abs().max() < 0.05 * (loaded - base).abs().max()


@pytest.mark.parametrize(
    ("loaded", "widgets", "said"),
    [
        (graphs.CHECKPOINT, {"checkpoint": graphs.CHECKPOINT}, "No sign of a few-step LoRA"),
        (graphs.CHECKPOINT, {"lora_name": graphs.LORA}, "No sign of a few-step LoRA"),
        (MERGED, {"checkpoint": MERGED}, f"{graphs.LORA} was merged at strength 1. Recipe: steps"),
        (NAMED, {"checkpoint": NAMED}, "may carry a few-step LoRA: its metadata prompt has"),
        (SILENT, {}, "No sign of a few-step LoRA"),
        (
            SILENT,
            {"lora_name": graphs.LORA, "refuse": False},
            "is in its weights (0.7 to 1: all of it)",
        ),
    ],
)
def test_what_the_check_finds(
    server: ComfyServer, loaded: str, widgets: dict[str, Any], said: str
) -> None:
    report, error = checked(server, loaded, **widgets)
    assert error is None
    assert said in report


@pytest.mark.parametrize("loaded", [MERGED, SILENT])
def test_a_second_application_is_refused(server: ComfyServer, loaded: str) -> None:
    _, error = checked(server, loaded, checkpoint=loaded, lora_name=graphs.LORA)
    assert f"{graphs.LORA} would be the second one" in error


def test_a_lora_of_another_architecture_is_said(server: ComfyServer) -> None:
    _, error = checked(server, graphs.CHECKPOINT, lora_name=model_files.FOREIGN_LORA)
    assert "was made for another architecture" in error


@pytest.mark.parametrize(
    ("strength", "said"), [(1.0, "is in its weights"), (0.4, "may carry"), (-0.5, "No sign")]
)
def test_a_loaded_lora_is_measured_at_its_strength(
    server: ComfyServer, model: TinyModel, strength: float, said: str
) -> None:
    """Loaded by ComfyUI's own loader from a file that says nothing."""
    graph = Setup(lora=None)
    base = graph.model
    stock = {"lora_name": model_files.PLAIN_LORA, "strength_model": strength}
    graph.model = graph.add("LoraLoaderModelOnly", model=base, **stock)[0]
    made = graph.sample(graph.sampler(), graph.sigmas())  # ComfyUI patches the weights in place
    latents(server, graph, made)
    widgets = {"checkpoint": "not named", "lora_name": model_files.PLAIN_LORA, "refuse": False}
    nodes = [graph.add("DMD2_MergeCheck", model=m, **widgets) for m in (graph.model, base)]
    shown = [graph.add("PreviewAny", source=node[2]) for node in nodes]
    run = server.run(graph.prompt)
    patched, plain = (run.outputs[node.name]["text"][0] for node in shown)
    assert said in patched
    assert "No sign" in plain


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"lora": 1}', '{"lora": "x", "strength": "much"}', "[" * 100_000]
)
def test_unreadable_statements_of_a_merge_are_none(pack, text: str) -> None:
    presence = pack("nodes.lora_presence")
    assert presence.merged_lora({"dmd2.merged": text}) == ""
    assert presence.merged_lora({}) == ""
    good = {"dmd2.merged": '{"lora": "a.safetensors", "strength": 0.5}'}
    assert presence.merged_lora(good) == "a.safetensors was merged at strength 0.5"


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ("My Model DMD2 v3", True),
        ("Juggernaut XL Lightning", True),
        ('{"4": {"inputs": {"lora_name": "Hyper-SDXL-8steps-lora.safetensors"}}}', True),
        ("lcm-lora-sdxl", True),
        ("sd_xl_turbo_1.0", True),
        ("a film camera", False),
        ("malcmere", False),
        ("sd_xl_base_1.0", False),
    ],
)
def test_which_words_count_as_few_step(pack, value: str, found: bool) -> None:
    assert bool(pack("nodes.lora_presence").named_in({"modelspec.title": value})) == found
