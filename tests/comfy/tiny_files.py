"""What workflows need besides checkpoint and LoRA, in the tiny model's size: a ControlNet and a
picture with a mask."""

from __future__ import annotations

from pathlib import Path

import tiny_workflow
import torch
import workflow_set
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from train_lora.demo import scenes

HINT_CHANNELS = (3, 16, 16, 32, 32, 96, 96, 256)
WIDTH = 32
STRENGTH = 0.05
PREFIX = "model.diffusion_model."


def write_controlnet(checkpoint: Path, path: Path) -> None:
    """An untrained ControlNet for the UNet in `checkpoint`: its encoder, and small random
    convolutions where a trained one would have learned some."""
    generator = torch.Generator().manual_seed(5)
    unet = {
        name.removeprefix(PREFIX): value
        for name, value in load_file(checkpoint).items()
        if name.startswith(PREFIX)
    }
    parts = ("time_embed.", "label_emb.", "input_blocks.", "middle_block.")
    tensors = {name: value for name, value in unet.items() if name.startswith(parts)}

    def convolution(name: str, inputs: int, outputs: int, size: int, scale: float) -> None:
        shape = (outputs, inputs, size, size)
        spread = scale / (inputs * size * size) ** 0.5
        tensors[f"{name}.weight"] = spread * torch.randn(shape, generator=generator)
        tensors[f"{name}.bias"] = torch.zeros(outputs)

    channels = [*HINT_CHANNELS, WIDTH]
    for index in range(len(channels) - 1):
        convolution(f"input_hint_block.{2 * index}", channels[index], channels[index + 1], 3, 1.0)
    for index, width in enumerate(_block_widths(unet)):
        convolution(f"zero_convs.{index}.0", width, width, 1, STRENGTH)
    middle = unet["middle_block.2.out_layers.3.bias"].shape[0]
    convolution("middle_block_out.0", middle, middle, 1, STRENGTH)
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def _block_widths(unet: dict[str, Tensor]) -> list[int]:
    """Channels that each input block puts out."""
    widths = []
    while True:
        block = f"input_blocks.{len(widths)}.0."
        for end in ("bias", "op.bias", "out_layers.3.bias"):
            if block + end in unet:
                widths.append(unet[block + end].shape[0])
                break
        else:
            return widths


def write_pictures(folder: Path) -> None:
    """A drawn scene, and the same with a round hole in its alpha: ComfyUI's mask."""
    scene = scenes.Scene(
        shape="circle", colour="yellow", background="green", pattern="tiled", size="large"
    )
    [drawn] = scenes.draw([scene], torch.Generator().manual_seed(3))
    levels = ((drawn + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    picture = Image.fromarray(levels.permute(1, 2, 0).numpy())
    picture.save(folder / workflow_set.IMAGE)
    picture.putalpha(Image.fromarray(_outside_disc(*picture.size).numpy()))
    picture.save(folder / tiny_workflow.MASKED_IMAGE)


def _outside_disc(width: int, height: int) -> Tensor:
    """255 outside of a disc around the middle, 0 inside: (height, width), uint8."""
    down, across = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
    return ((down[:, None] ** 2 + across**2) > 0.5).to(torch.uint8) * 255
