"""Graphs that begin with checkpoint, LoRA and prompt, and what they make in the running ComfyUI."""

from __future__ import annotations

import json
from typing import Any

import graphs
from comfy_server import ComfyServer, Run
from graphs import Graph, Node
from model_files import SIZE_PX
from renders import CAPTION, SEED
from safetensors.torch import load
from torch import Tensor

from train_lora.demo.architecture import LATENT_SCALE


class Setup(Graph):
    """Checkpoint, LoRA and prompt, and shorthands for what comes after."""

    def __init__(
        self,
        lora: str | None = graphs.LORA,
        family: str = "from the file",
        checkpoint: str = graphs.CHECKPOINT,
    ) -> None:
        super().__init__()
        loaded = self.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
        self.model, self.clip, self.vae = loaded[0], loaded[1], loaded[2]
        if lora is not None:
            self.load(lora, family)
        self.positive, self.negative = self.text(CAPTION), self.text("")
        self.empty = self.latent()

    def load(self, lora: str, family: str = "from the file", **inputs: Any) -> Node:
        options = {"lora_name": lora, "strength": 1.0, "family": family, "model": self.model}
        node = self.add("DMD2_LoadLoRA", **options | inputs)
        self.model = node[0]
        return node

    def text(self, caption: str) -> list[Any]:
        return self.add("CLIPTextEncode", clip=self.clip, text=caption)[0]

    def latent(self, batch: int = 1) -> list[Any]:
        size = {"width": SIZE_PX, "height": SIZE_PX}
        return self.add("EmptyLatentImage", batch_size=batch, **size)[0]

    def mask(self) -> list[Any]:
        """1 in the left half."""
        size = {"height": SIZE_PX}
        whole = self.add("SolidMask", value=0.0, width=SIZE_PX, **size)
        half = self.add("SolidMask", value=1.0, width=SIZE_PX // 2, **size)
        place = {"x": 0, "y": 0, "operation": "add"}
        return self.add("MaskComposite", destination=whole[0], source=half[0], **place)[0]

    def sigmas(self, **widgets: Any) -> list[Any]:
        defaults = {"model": self.model, "steps": 0, "timesteps": "", "denoise": 1.0}
        return self.add("DMD2_Scheduler", **defaults | widgets)[0]

    def sampler(self, **widgets: Any) -> list[Any]:
        defaults = {"strength": 1.0, "strengths": "", "noise_seed": -1, "noise": "per image"}
        return self.add("DMD2_Sampler", **defaults | widgets)[0]

    def lcm(self) -> list[Any]:
        return self.add("KSamplerSelect", sampler_name="lcm")[0]

    def sample(self, sampler: list[Any], sigmas: list[Any], **changed: Any) -> list[Any]:
        inputs = {"model": self.model, "positive": self.positive, "negative": self.negative}
        inputs |= {"cfg": 1.0, "add_noise": True, "noise_seed": SEED, "latent_image": self.empty}
        return self.add("SamplerCustom", sampler=sampler, sigmas=sigmas, **inputs | changed)[0]

    def ksampler(self, **changed: Any) -> list[Any]:
        inputs = {"model": self.model, "positive": self.positive, "negative": self.negative}
        inputs |= {"seed": SEED, "steps": 4, "cfg": 1.0, "sampler_name": "lcm"}
        inputs |= {"scheduler": "simple", "denoise": 1.0, "latent_image": self.empty}
        return self.add("KSampler", **inputs | changed)[0]

    def record(self) -> list[Any]:
        """From here on the model notes what its network is asked; for `asked`."""
        node = self.add("TestRecord", model=self.model)
        self.model = node[0]
        return node[1]


def latents(server: ComfyServer, graph: Graph, *made: list[Any]) -> list[Tensor]:
    """Each of the latents that `graph` makes: (B, 4, 16, 16), in the model's own scale."""
    saved = [
        graph.add("SaveLatent", samples=link, filename_prefix="latents/t").name for link in made
    ]
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    files = [run.outputs[name]["latents"][0] for name in saved]
    return [load(server.view(file))["latent_tensor"] * LATENT_SCALE for file in files]


def asked(server: ComfyServer, graph: Graph, record: list[Any], latent: list[Any]) -> Any:
    """[timestep, rows of the batch] of every call of the network."""
    node = graph.add("TestRecorded", latent=latent, record=record)
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    return json.loads(run.outputs[node.name]["calls"][0])


def refused(server: ComfyServer, graph: Graph, made: list[Any]) -> Run:
    graph.add("SaveLatent", samples=made, filename_prefix="latents/t")
    run = server.run(graph.prompt)
    assert run.error is not None
    return run
