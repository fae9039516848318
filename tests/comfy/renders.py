"""What the tests have the running ComfyUI make, as tensors."""

from __future__ import annotations

import io
from typing import Any

import torch
from comfy_server import ComfyServer, Run
from graphs import sampling_graph
from model_files import SIZE_PX
from PIL import Image
from safetensors.torch import load
from torch import Tensor

from train_lora.demo.architecture import LATENT_SCALE

CAPTION = "a small red ring on a striped blue background, left"
SEED = 1234
ATOL = 1e-3
"""On latents of unit size: float32 against float32 in another order, 14.6 times at t = 999."""


def sampled(server: ComfyServer, **options: Any) -> tuple[Tensor, Tensor, Run]:
    """Latents (B, 4, 16, 16) in the model's own scale, pictures (B, 3, 128, 128) in [0, 1]."""
    graph, names = sampling_graph(
        **{"caption": CAPTION, "seed": SEED, "size_px": SIZE_PX} | options
    )
    run = server.run(graph.prompt)
    assert run.error is None, f"{run.failed_node}: {run.error}"
    [latent_file] = run.outputs[names["latent"]]["latents"]
    latent = load(server.view(latent_file))["latent_tensor"]
    pictures = [picture(server, file) for file in run.outputs[names["image"]]["images"]]
    return latent * LATENT_SCALE, torch.stack(pictures), run


def picture(server: ComfyServer, file: dict[str, str]) -> Tensor:
    """(3, H, W) in [0, 1]."""
    with Image.open(io.BytesIO(server.view(file))) as image:
        pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        return pixels.reshape(image.height, image.width, 3).permute(2, 0, 1) / 255


def first_noise(batch: int = 1) -> Tensor:
    """What ComfyUI's sampling nodes draw for SEED."""
    shape = (batch, 4, SIZE_PX // 8, SIZE_PX // 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED))


def failure(server: ComfyServer, **options: Any) -> Run:
    graph, _ = sampling_graph(**{"caption": CAPTION, "seed": SEED, "size_px": SIZE_PX} | options)
    run = server.run(graph.prompt)
    assert run.error is not None
    return run


def reports(run: Run) -> list[str]:
    """What DMD2 Load LoRA said, on itself and where Preview as Text showed it, each once."""
    texts = [text for output in run.outputs.values() for text in output.get("text", ())]
    return list(dict.fromkeys(text for text in texts if "modules applied" in text))
