"""What a run leaves: the student as a LoRA, and as a whole checkpoint where it is one.

The end of a run and `dmd2 export` both come here, so that they write the same files.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dmd2_core import Recipe

from .config import Config
from .config_effects import ineffective_keys
from .data.training_data import encode_captions
from .export import export_lora, write_lora
from .extract import extract_lora
from .lora_metadata import modelspec
from .model_setup import load_model
from .models.class_condition import AnyCondition
from .models.components import Components
from .models.roles import STUDENT, SharedUNet
from .pictures import jpeg_data_url
from .sampling import decode_latents, sample_latents, step_plan
from .sharding import whole_network

if TYPE_CHECKING:
    from .models.edm_network import EDMNetwork

log = logging.getLogger(__name__)

CHECKPOINT_FILE = "student.safetensors"
THUMBNAIL_PX = 256


def trained_with(
    config: Config, iterations: int, earlier: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What a recipe tells about a training; under "earlier" the same of the run that it continues.

    Keys without effect are left out: the config.toml that a run is resumed from does not hold them.
    """
    settings: dict[str, Any] = config.recipe_settings()
    for section, name in (key.split(".") for key in ineffective_keys(config)):
        settings.get(section, {}).pop(name, None)
    settings["training"]["iterations"] = iterations
    return settings if earlier is None else settings | {"earlier": dict(earlier)}


def recipe_of(
    config: Config,
    components: Components,
    iterations: int,
    earlier: Mapping[str, Any] | None = None,
) -> Recipe:
    """How to sample with the student, and how it was made, in so many iterations.

    Of no rank: that is the file's (`write_lora`). `earlier`: `trained_with` of the run before.
    """
    plan = step_plan(config)
    return Recipe(
        timesteps=plan.timesteps,
        conditioning_timestep=plan.conditioning_timestep,
        trained_steps=config.sampling.random_steps,
        prediction=components.prediction,
        zero_terminal_snr=components.schedule.has_zero_terminal_snr,
        teacher_guidance=None
        if "distribution_matching.guidance" in ineffective_keys(config)
        else config.distribution_matching.guidance,
        base_model=components.name,
        base_model_hash=components.base_hash,
        trained_with=trained_with(config, iterations, earlier),
    )


def thumbnail_condition(config: Config, components: Components, caption: str) -> AnyCondition:
    """What the picture in the metadata shows: one row."""
    return encode_captions(components, [caption], config.data.resolution_px)


@torch.no_grad()
def thumbnail(
    config: Config, components: Components, unet: SharedUNet, condition: AnyCondition
) -> str:
    """A small picture by the student, as a data URL."""
    latents = sample_latents(
        unet, STUDENT, components, condition, step_plan(config), seed=config.training.seed
    )
    return jpeg_data_url(decode_latents(components, latents)[0], THUMBNAIL_PX)


def export_student(
    config: Config,
    components: Components,
    unet: SharedUNet,
    path: Path,
    *,
    whole: Path,
    iterations: int,
    earlier: Mapping[str, Any] | None = None,
    pictured: AnyCondition | None,
    overwrite: bool = False,
    writes: bool = True,
) -> list[Path]:
    """Write the student as `unet` holds it: a LoRA at `path`; returns what was written.

    `writes`: in one process; the others of a sharded student give it their parts.

    Full weights become a checkpoint at `whole` (float16) and, by a singular value decomposition of
    their difference from the base, the LoRA of rank `student.rank`. An EDM student becomes the
    checkpoint alone (float32).
    """
    is_full, is_edm = config.student.kind == "full", components.kind == "edm"
    files = [whole] if is_edm else [path, whole] if is_full else [path]
    for file in files:
        if file.exists() and not overwrite:
            raise ValueError(f"{file} exists: choose another name or remove it")
    recipe = recipe_of(config, components, iterations, earlier)
    picture = None if pictured is None else thumbnail(config, components, unet, pictured)
    side_px, names = config.data.resolution_px, config.export.names
    student = whole_network(unet.network_of(STUDENT)) if is_full else None
    if not writes:
        return []
    if student is None:
        export_lora(
            unet, STUDENT, path, recipe,
            names=names, side_px=side_px, thumbnail=picture, overwrite=overwrite,
        )  # fmt: skip
        return files
    if is_edm:
        _write_edm(student, whole, recipe, picture)
        return files
    _write_checkpoint(
        replace(components, unet=student), whole, recipe, side_px, picture, overwrite=overwrite
    )
    base = load_model(config).unet.state_dict()  # as stored: the trained one may be rounded
    extraction = extract_lora(student.state_dict(), base, config.student.rank)
    log.info(
        "the LoRA of rank %d holds %.0f%% of the student's squared change; %s holds all of it",
        *(config.student.rank, 100 * extraction.kept, whole),
    )
    write_lora(
        extraction.modules, student.config, path, recipe,
        names=names, side_px=side_px, thumbnail=picture, overwrite=overwrite,
    )  # fmt: skip
    return files


def _write_edm(student: EDMNetwork, path: Path, recipe: Recipe, picture: str | None) -> None:
    from .models.edm_network import save_edm

    shown = {} if picture is None else {"modelspec.thumbnail": picture}
    save_edm(student, path, recipe.to_metadata() | shown)


def _write_checkpoint(
    student: Components,
    path: Path,
    recipe: Recipe,
    side_px: int,
    picture: str | None,
    *,
    overwrite: bool,
) -> None:
    from .models.saving import save_single_file

    metadata = recipe.to_metadata() | modelspec(
        recipe, student.kind, side_px, form="", thumbnail=picture
    )
    save_single_file(student, path, metadata=metadata, overwrite=overwrite)
