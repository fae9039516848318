"""A small EDM teacher that learns its pictures in seconds: three classes, each of two colours.

Each pixel of a picture is one of its class's two colours, at random: opposites, so that the class's
mean, which is such a teacher's one-step sample, is gray, as far from both as can be.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2_core import (
    EDMSchedule,
    SteppedSchedule,
    add_noise,
    coefficients,
    denoising_loss,
    edm_loss_weight,
)
from train_lora.config import Config
from train_lora.config_load import load
from train_lora.models.class_condition import ClassCondition
from train_lora.models.edm_network import EDMNetwork, save_edm
from train_lora.models.edm_unet import EDMConfig
from train_lora.pictures import to_picture

CLASSES, SIDE_PX, LEARNING_RATE = 3, 8, 5e-3
SIZE = EDMConfig(
    resolution_px=SIDE_PX,
    classes=CLASSES,
    width=32,
    width_factors=(1,),
    blocks=1,
    attention_px=(),
    head_channels=32,
)


def colours() -> Tensor:
    """(3, 2, 3): of each class a colour and its opposite, channels in [-1, 1]."""
    one = 0.6 * torch.tensor([[1.0, 1.0, -1.0], [1.0, -1.0, 1.0], [-1.0, 1.0, 1.0]])
    return torch.stack([one, -one], dim=1)


def real_pictures(labels: Tensor, draws: torch.Generator) -> Tensor:
    """One for each of the labels (B,): (B, 3, 8, 8)."""
    which = torch.randint(2, (len(labels), SIDE_PX, SIDE_PX), generator=draws)
    return colours()[labels[:, None, None], which].permute(0, 3, 1, 2)


def distance(pictures: Tensor, labels: Tensor) -> Tensor:
    """How far the pixels (B, 3, 8, 8) are from the nearer colour of their class: (B,), 0 for real
    pictures, 0.6 for gray ones (root mean square over the channels, mean over pixels)."""
    apart = pictures[:, None] - colours()[labels][:, :, :, None, None]
    return apart.square().mean(2).sqrt().amin(1).flatten(1).mean(1)


def random_teacher() -> EDMNetwork:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EDMNetwork(SIZE)


def write_teacher(path: Path, *, iterations: int) -> Path:
    """Trained on `real_pictures` as EDM is; 0 iterations: one that only scales its input."""
    network, schedule, steps = random_teacher(), EDMSchedule(), SteppedSchedule.edm()
    draws = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(network.parameters(), betas=(0.9, 0.99))
    batch = 16
    for iteration in range(iterations):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, 2 * (1 - iteration / iterations))
        labels = torch.randint(CLASSES, (batch,), generator=draws)
        x0 = real_pictures(labels, draws)
        levels = torch.randn(batch, generator=draws, dtype=torch.float64)
        sigma = (1.2 * levels - 1.2).exp()  # EDM's own choice, which has little at high noise
        sigma[::2] = steps.time(torch.randint(1000, (batch // 2,), generator=draws))
        eps = torch.randn(x0.shape, generator=draws)
        output = network(add_noise(schedule, x0, eps, sigma), sigma, labels)
        scales, weight = coefficients(schedule, sigma, x0), edm_loss_weight(sigma)
        optimizer.zero_grad()
        denoising_loss("sample", output, x0, eps, *scales, weight).backward()
        optimizer.step()
    save_edm(network, path, {})
    return path


def class_folder(folder: Path, per_class: int = 8) -> Path:
    """`real_pictures` as files: FOLDER/CLASS/PICTURE.png."""
    draws = torch.Generator().manual_seed(2)
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
        pictures = real_pictures(torch.full((per_class,), label), draws)
        for number, picture in enumerate(pictures):
            to_picture(picture).save(folder / str(label) / f"{number}.png")
    return folder


def settings(teacher: Path, pictures: Path, directory: Path, **overrides: Any) -> dict[str, str]:
    """Key -> text of a run; `section__key=value` overrides, None for the key's default."""
    values: dict[str, Any] = {
        "model.path": teacher,
        "data.real_images": pictures,
        "data.resolution_px": SIDE_PX,
        "output.directory": directory,
        "student.learning_rate": 3e-4,
        "critic.learning_rate": 1e-3,
        "gan.learning_rate": 1e-3,
        "training.iterations": 4,
        "training.batch_size": 16,
        "training.mixed_precision": "no",
        "training.gradient_checkpointing": "false",
        "validation.every": 0,
        "logging.trackers": "[]",
    }
    values |= {key.replace("__", "."): value for key, value in overrides.items()}
    return {key: str(value) for key, value in values.items() if value is not None}


def edm_config(teacher: Path, pictures: Path, directory: Path, **overrides: Any) -> Config:
    given = settings(teacher, pictures, directory, **overrides)
    return load(preset="imagenet64", overrides=list(given.items())).config


def tree(folder: Path, *names: str) -> Path:
    """Empty files of these names in `folder`."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def inputs(count: int = 3) -> tuple[Tensor, Tensor, ClassCondition]:
    """Noised pictures, their steps from clean to noisy, and their classes."""
    x_t = 3 * torch.randn(count, 3, SIDE_PX, SIDE_PX, generator=torch.Generator().manual_seed(8))
    labels = torch.arange(count) % CLASSES
    return x_t, torch.tensor([0, 500, 999])[:count], ClassCondition(labels=labels, side_px=SIDE_PX)
