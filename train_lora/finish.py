"""What a run leaves: the student as a LoRA, and as a whole checkpoint where it is one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dmd2_core import Recipe

from .config import Config
from .data.training_data import encode_captions
from .distill import Distiller
from .export import export_lora, write_lora
from .extract import extract_lora
from .lora_metadata import modelspec
from .model_setup import load_model
from .models.roles import STUDENT
from .models.text import Condition
from .pictures import jpeg_data_url
from .sampling import decode_latents, sample_latents

CHECKPOINT_FILE = "student.safetensors"
THUMBNAIL_PX = 256


def recipe_of(config: Config, distiller: Distiller) -> Recipe:
    """How to sample with the student, and how it was made."""
    components = distiller.components
    return Recipe(
        timesteps=distiller.plan.timesteps,
        conditioning_timestep=distiller.plan.conditioning_timestep,
        prediction=components.prediction,
        zero_terminal_snr=components.schedule.has_zero_terminal_snr,
        teacher_guidance=config.distribution_matching.guidance,
        lora_rank=config.student.rank,
        lora_alpha=config.student.alpha,
        base_model=components.name,
        base_model_hash=components.base_hash,
        trained_with=config.recipe_settings(),
    )


def thumbnail_condition(config: Config, distiller: Distiller, captions: list[str]) -> Condition:
    """What the picture in the metadata shows: the first training caption."""
    return encode_captions(distiller.components, captions[:1], config.data.resolution_px)


@torch.no_grad()
def thumbnail(config: Config, distiller: Distiller, condition: Condition) -> str:
    """A small picture by the student, as a data URL."""
    latents = sample_latents(
        distiller.unet,
        STUDENT,
        distiller.components,
        condition[:1],
        distiller.plan,
        seed=config.training.seed,
    )
    return jpeg_data_url(decode_latents(distiller.components, latents)[0], THUMBNAIL_PX)


def export_student(
    config: Config, distiller: Distiller, path: Path, *, picture: str | None = None
) -> None:
    """Write the student as it is now: a LoRA at `path`, and full weights beside it.

    Full weights become a checkpoint (`student.safetensors`, float16) and, by a singular value
    decomposition of their difference from the base, the LoRA of rank `student.rank`.
    """
    recipe = recipe_of(config, distiller)
    if config.student.kind == "lora":
        export_lora(
            distiller.unet,
            STUDENT,
            path,
            recipe,
            names=config.export.names,
            side_px=config.data.resolution_px,
            thumbnail=picture,
        )
        return
    student = distiller.unet.network_of(STUDENT)
    _write_checkpoint(config, distiller, path.with_name(CHECKPOINT_FILE), recipe, picture)
    base = load_model(config).unet.state_dict()  # as stored: the trained one may be rounded
    extraction = extract_lora(student.state_dict(), base, config.student.rank)
    print(
        f"The LoRA of rank {config.student.rank} holds {extraction.kept:.0%} of the student's "
        f"squared change; {CHECKPOINT_FILE} holds all of it."
    )
    write_lora(
        extraction.modules,
        student.config,
        path,
        recipe,
        names=config.export.names,
        side_px=config.data.resolution_px,
        thumbnail=picture,
    )


def _write_checkpoint(
    config: Config, distiller: Distiller, path: Path, recipe: Recipe, picture: str | None
) -> None:
    from .models.saving import save_single_file

    components = replace(distiller.components, unet=distiller.unet.network_of(STUDENT))
    recipe = replace(recipe, lora_rank=None, lora_alpha=None)
    metadata = recipe.to_metadata() | modelspec(
        recipe, components.kind, config.data.resolution_px, form="", thumbnail=picture
    )
    save_single_file(components, path, metadata=metadata)
