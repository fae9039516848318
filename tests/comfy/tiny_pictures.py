"""The pictures that workflows start from, in the tiny model's size."""

from __future__ import annotations

from pathlib import Path

import tiny_workflow
import torch
import workflow_set
from PIL import Image
from torch import Tensor

from train_lora.demo import scenes


def write_pictures(folder: Path) -> None:
    """A drawn scene, and the same with a round hole in its alpha: ComfyUI's mask."""
    scene = scenes.Scene(
        shape="circle",
        colour="yellow",
        background="green",
        pattern="tiled",
        size="large",
        place="centre",
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
