"""Graphs for the tests: the shipped workflow in ComfyUI's API format, and small ones by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from comfy_server import Prompt

REPOSITORY = Path(__file__).resolve().parents[2]
WORKFLOW_FILE = REPOSITORY / "workflows" / "dmd2_4step.json"
CHECKPOINT = "sd_xl_base_1.0.safetensors"
LORA = "dmd2_sdxl_4step_lora_fp16.safetensors"
"""The names in the shipped workflows; the tests store the tiny model's files under them."""
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOT_EXECUTED = ("Note", "MarkdownNote", "Reroute")
SEEDS = ("seed", "noise_seed")
"""The page adds "control after generate" to integers of these names unless the node says no."""
SEED_CONTROLS = ("fixed", "increment", "decrement", "randomize")


def api_format(workflow: dict[str, Any], object_info: dict[str, Any]) -> Prompt:
    """What the page sends for a workflow file: links as [node, output], widgets by their names."""
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    prompt: Prompt = {}
    for node in workflow["nodes"]:
        if node["type"] in NOT_EXECUTED:
            continue
        linked = {
            socket["name"]: links[socket["link"]]
            for socket in node.get("inputs", [])
            if socket.get("link") is not None
        }
        values = iter(node.get("widgets_values", []))
        inputs: dict[str, Any] = {}
        for name, control in widgets_of(object_info[node["type"]]):
            inputs[name] = next(values)
            if control:
                assert next(values) in SEED_CONTROLS, node
        assert next(values, None) is None, f"too many widget values: {node}"
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs | linked}
    return prompt


def widgets_of(info: dict[str, Any]) -> list[tuple[str, bool]]:
    """A node's widgets in order, and whether "control after generate" follows one."""
    widgets = []
    for kind in ("required", "optional"):
        for name, (type_, *options) in info["input"].get(kind, {}).items():
            settings = options[0] if options else {}
            is_widget = isinstance(type_, list) or type_ in WIDGETS
            if is_widget and not settings.get("forceInput"):
                control = settings.get("control_after_generate")
                widgets.append((name, name in SEEDS if control is None else bool(control)))
    return widgets


def shipped_workflow() -> dict[str, Any]:
    return json.loads(WORKFLOW_FILE.read_text())


class Graph:
    """An API-format prompt under construction; `add` returns links to the new node's outputs."""

    def __init__(self) -> None:
        self.prompt: Prompt = {}

    def add(self, class_type: str, **inputs: Any) -> Node:
        name = str(len(self.prompt) + 1)
        self.prompt[name] = {"class_type": class_type, "inputs": inputs}
        return Node(name)


class Node:
    def __init__(self, name: str) -> None:
        self.name = name

    def __getitem__(self, output: int) -> list[Any]:
        return [self.name, output]


def sampling_graph(
    *,
    caption: str,
    seed: int,
    size_px: int,
    batch: int = 1,
    lora: str | None = LORA,
    one_step: int | None = None,
    stock: tuple[str, str] | None = None,
    scheduler: dict[str, Any] | None = None,
    sampler: dict[str, Any] | None = None,
) -> tuple[Graph, dict[str, str]]:
    """Checkpoint, LoRA, sampling, latent and picture; and the ids of the interesting nodes.

    `one_step`: a conditioning timestep; `stock`: names of a stock sampler and scheduler (4 steps,
    or 1 with `one_step`) instead of the pack's; the last two: widgets of the pack's nodes.
    """
    graph = Graph()
    names: dict[str, str] = {}
    checkpoint = graph.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
    model, recipe = checkpoint[0], {}
    if lora is not None:
        loading = {"strength": 1.0, "family": "from the file"}
        loader = graph.add("DMD2_LoadLoRA", model=model, lora_name=lora, **loading)
        model, recipe = loader[0], {"recipe": loader[2]}
        names["report"] = graph.add("PreviewAny", source=loader[3]).name
    if one_step is not None:
        patch = graph.add("DMD2_ConditioningTimestep", model=model, timestep=one_step, **recipe)
        model = patch[0]
    num_steps = 1 if one_step is not None else 4
    if stock is None:
        widgets = {"steps": 0, "timesteps": "", "denoise": 1.0}
        sigmas = graph.add("DMD2_Scheduler", model=model, **recipe, **widgets | (scheduler or {}))
        widgets = {"strength": 1.0, "strengths": "", "noise_seed": -1, "noise": "per image"}
        solver = graph.add("DMD2_Sampler", **recipe, **widgets | (sampler or {}))
    else:
        sigmas = graph.add(
            "BasicScheduler", model=model, scheduler=stock[1], steps=num_steps, denoise=1.0
        )
        solver = graph.add("KSamplerSelect", sampler_name=stock[0])
    positive = graph.add("CLIPTextEncode", clip=checkpoint[1], text=caption)
    negative = graph.add("CLIPTextEncode", clip=checkpoint[1], text="")
    empty = graph.add("EmptyLatentImage", width=size_px, height=size_px, batch_size=batch)
    sampled = graph.add(
        "SamplerCustom",
        **{"model": model, "positive": positive[0], "negative": negative[0], "cfg": 1.0},
        **{"add_noise": True, "noise_seed": seed, "sampler": solver[0], "sigmas": sigmas[0]},
        latent_image=empty[0],
    )
    decoded = graph.add("VAEDecode", samples=sampled[0], vae=checkpoint[2])
    names["sampled"] = sampled.name
    names["latent"] = graph.add("SaveLatent", samples=sampled[0], filename_prefix="latents/t").name
    names["image"] = graph.add("SaveImage", images=decoded[0], filename_prefix="t").name
    return graph, names
