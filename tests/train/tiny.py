"""A tiny SDXL with random weights and a config for it: parts that several trainer tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dmd2_core import Recipe, StepPlan, VPSchedule
from train_lora.adversary import build_head
from train_lora.config import Config
from train_lora.config_load import load
from train_lora.data.training_data import TrainingData
from train_lora.demo import architecture
from train_lora.distill import Batch, Distiller, RealImages
from train_lora.export import export_lora
from train_lora.models.components import Components
from train_lora.models.fingerprint import unet_hash
from train_lora.models.roles import STUDENT, LoraSpec, SharedUNet
from train_lora.models.text import Condition, size_ids
from train_lora.models.tokenizer import build_tokenizers
from train_lora.trainer import Trainer, build_trainer


def demo_config(directory: Path, **overrides: Any) -> Config:
    """The demo preset with `section__key=value` overrides."""
    pairs = [(key.replace("__", "."), str(value)) for key, value in overrides.items()]
    return load(preset="demo", overrides=[("output.directory", str(directory)), *pairs]).config


def random_components(seed: int = 0) -> Components:
    """The embedded teacher's structure with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet, vae = architecture.build_unet(), architecture.build_vae()
        encoders = list(architecture.build_text_encoders())
        for network in (unet, vae, *encoders):
            network.requires_grad_(False).eval()
            for name, weight in network.named_parameters():
                if "norm" in name or name.endswith("bias"):  # 1 and 0 would hide a mix-up
                    weight.add_(torch.randn_like(weight), alpha=0.1)
    return Components(
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=build_tokenizers(),
        schedule=VPSchedule.sdxl(),
        prediction="epsilon",
        base_hash=unet_hash(unet),
        name="tiny",
    )


def random_condition(count: int, generator: torch.Generator) -> Condition:
    width = architecture.WIDTH_L + architecture.WIDTH_G
    return Condition(
        hidden=torch.randn(count, 77, width, generator=generator),
        pooled=torch.randn(count, architecture.WIDTH_G, generator=generator),
        time_ids=size_ids(count, 128, 128),
    )


def random_batch(count: int, generator: torch.Generator) -> Batch:
    return Batch(
        condition=random_condition(count, generator),
        real=RealImages(
            latents=torch.randn(count, 4, 16, 16, generator=generator),
            condition=random_condition(count, generator),
        ),
    )


@torch.no_grad()
def random_distiller(config: Config, seed: int = 0) -> Distiller:
    """Both adapters away from their zero start, so that every network differs."""
    components = random_components(seed)
    generator = torch.Generator().manual_seed(seed)
    adapters = {role: LoraSpec(rank=4, alpha=4.0) for role in ("student", "critic")}
    unet = SharedUNet(components.unet, adapters, seed=seed)
    for role in adapters:
        for parameter in unet.parameters_of(role):
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    return Distiller(
        unet=unet,
        head=build_head(config.gan, unet, 16, generator),
        components=components,
        plan=StepPlan.evenly(4),
        config=config,
    )


SMALL = {
    "training__batch_size": 2,
    "student__rank": 4,
    "critic__rank": 4,
    "validation__every": 0,
}


def small_data(prompts: int = 4, images: int = 4) -> TrainingData:
    """Random conditions and latents of the tiny model, the same at every call."""
    generator = torch.Generator().manual_seed(3)
    return TrainingData.in_memory(
        captions=["a scene"] * prompts,
        condition=random_condition(prompts, generator),
        real=RealImages(
            latents=torch.randn(images, 4, 16, 16, generator=generator),
            condition=random_condition(images, generator),
        ),
    )


def small_trainer(directory: Path, **overrides: object) -> Trainer:
    """Six prompts and five images, random; batches of 2 unless `overrides` say otherwise.

    None takes a value of `SMALL` back.
    """
    values = {key: value for key, value in (SMALL | overrides).items() if value is not None}
    config = demo_config(directory, **values)
    data = small_data(prompts=6, images=5)
    return build_trainer(config, random_components(), data, Accelerator(cpu=True))


def real_latents(trainer: Trainer) -> torch.Tensor:
    """Those that `small_trainer` trains on: what is written into them, it sees."""
    return trainer.data.buckets[0].images.part.columns["latents"]


def weights(trainer: Trainer, role: str) -> torch.Tensor:
    parameters = trainer.distiller.unet.parameters_of(role)
    return torch.cat([p.detach().flatten().clone() for p in parameters])


def student_file(
    path: Path, recipe: Recipe | None = None, components: Components | None = None, rank: int = 2
) -> Path:
    """A LoRA of random weights for these components, written to `path`."""
    model = components or random_components()
    unet = SharedUNet(model.unet, {STUDENT: LoraSpec(rank=rank, alpha=1.0)}, seed=1)
    for weight in unet.parameters_of(STUDENT):
        weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    recipe = recipe or Recipe(timesteps=(999, 749, 499, 249))
    export_lora(unet, STUDENT, path, recipe, dtype=torch.float32)
    return path
