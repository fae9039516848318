"""DMD2 Sample in a running ComfyUI, against the pack's nodes put together by hand and dmd2_core."""

from __future__ import annotations

from typing import Any

import model_files
import pytest
import torch
from comfy_server import ComfyServer, Run
from graphs import CHECKPOINT, LORA, Graph
from model_files import SIZE_PX, TinyModel
from safetensors.torch import load
from test_workflow import ATOL, CAPTION, SEED, model, sampled, texts
from torch import Tensor

from train_lora.demo.architecture import LATENT_SCALE

__all__ = ["model"]
NEGATIVE = "a large green star on a dotted brown background"


class Sampling(Graph):
    """A graph with DMD2 Sample; further nodes can be added before it is run."""

    def __init__(self, lora: str | None = LORA, caption: str = CAPTION, batch: int = 1) -> None:
        super().__init__()
        self.checkpoint = self.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)
        self.model = self.checkpoint[0]
        if lora is not None:
            loading = {"strength": 1.0, "family": "from the file", "lora_name": lora}
            self.model = self.add("DMD2_LoadLoRA", model=self.model, **loading)[0]
        self.positive = self.text(caption)
        size = {"width": SIZE_PX, "height": SIZE_PX}
        self.latent = self.add("EmptyLatentImage", **size, batch_size=batch)[0]

    def text(self, text: str) -> list[Any]:
        return self.add("CLIPTextEncode", clip=self.checkpoint[1], text=text)[0]

    def sample(self, **options: Any) -> list[Any]:
        """A link to the latent; its plan is saved too."""
        inputs = {"model": self.model, "positive": self.positive, "latent_image": self.latent}
        return self.add("DMD2_Sample", **inputs | {"seed": SEED} | options)[0]

    def save(self, latent: list[Any]) -> str:
        return self.add("SaveLatent", samples=latent, filename_prefix="latents/s").name


def run_all(server: ComfyServer, graph: Sampling, *latents: list[Any]) -> tuple[list[Tensor], Run]:
    """Each latent (B, 4, 16, 16) in the model's own scale."""
    names = [graph.save(latent) for latent in latents]
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    files = [run.outputs[name]["latents"][0] for name in names]
    return [load(server.view(file))["latent_tensor"] * LATENT_SCALE for file in files], run


def plan(graph: Sampling, run: Run, latent: list[Any]) -> str:
    [text] = run.outputs[latent[0]]["text"]
    return text


def test_four_inputs_and_a_seed_are_the_nodes_put_together(
    server: ComfyServer, model: TinyModel
) -> None:
    graph = Sampling()
    [latent], run = run_all(server, graph, output := graph.sample())
    expected, _, _ = sampled(server)
    assert torch.equal(latent, expected)
    assert plan(graph, run, output) == "4 steps: 999, 749, 499, 249. 4 passes of the network."


def test_compare_draw(server: ComfyServer, model: TinyModel, tmp_path_factory) -> None:
    graph = Sampling()
    other = graph.add(
        "DMD2_LoadLoRA",
        model=graph.checkpoint[0],
        lora_name=model_files.ONE_STEP_LORA,
        strength=1.0,
        family="from the file",
    )[0]
    grid = graph.add(
        "DMD2_Compare",
        clip=graph.checkpoint[1],
        vae=graph.checkpoint[2],
        model_1=graph.model,
        model_2=other,
        label_2="one step",
        teacher=graph.checkpoint[0],
        prompts=CAPTION + "\n" + NEGATIVE,
        seed=3,
        width=128,
        height=128,
    )
    name = graph.add("SaveImage", images=grid[0], filename_prefix="c").name
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error} {run.log}"
    open("/tmp/smp/grid.png", "wb").write(server.view(run.outputs[name]["images"][0]))
