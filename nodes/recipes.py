"""Where a recipe comes from: the connection, the model, or the family that the user names.

A file without a recipe says nothing about itself, so people choose its family. What is listed here
follows each family's published instructions; what could not be established is left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..dmd2_core import Recipe, StepPlan
from .k_diffusion import has_zero_snr, prediction_of

RECIPE_ATTACHMENT = "dmd2_recipe"
"""Our loader's: a Recipe."""
METADATA_ATTACHMENT = "lora_metadata"
"""ComfyUI's own loaders' (0.30 and later): the metadata of the LoRA that was loaded last."""
FROM_FILE = "from the file"


def _evenly(num_steps: int, strength: float) -> Recipe:
    return Recipe(timesteps=StepPlan.evenly(num_steps).timesteps, strength=strength)


# Trailing spacing (Euler, DDIM) is StepPlan.evenly: 4 steps are 999, 749, 499, 249. Every family
# here has its guidance baked in (guidance_scale 0 or 1 in diffusers is cfg 1 in ComfyUI).
FAMILIES: Mapping[str, Recipe] = {
    # Model card of tianweiy/DMD2 (Hugging Face): LCMScheduler with these timesteps, guidance 0,
    # lora_scale 1; the one-step UNet with timesteps=[399].
    "DMD2, 4 steps": _evenly(4, 1.0),
    "DMD2, 1 step": Recipe(timesteps=(999,), conditioning_timestep=399),
    # Model cards of latent-consistency/lcm-lora-sdxl and -sdv1-5: LCMScheduler, 2 to 8 steps,
    # guidance off or 1 to 2. The timesteps are that scheduler's own, on its grid of 50
    # (diffusers 0.42: LCMScheduler().set_timesteps(n)).
    "LCM, 4 steps": Recipe(timesteps=(999, 759, 499, 259)),
    "LCM, 8 steps": Recipe(timesteps=(999, 879, 759, 639, 499, 379, 259, 139)),
    # Model card of ByteDance/SDXL-Lightning: EulerDiscreteScheduler, trailing, guidance 0, each
    # file with its own number of steps. (Its one-step model predicts x0 and is no LoRA.)
    "SDXL-Lightning, 2 steps": _evenly(2, 0.0),
    "SDXL-Lightning, 4 steps": _evenly(4, 0.0),
    "SDXL-Lightning, 8 steps": _evenly(8, 0.0),
    # Model card of ByteDance/Hyper-SD: the LoRAs for 2, 4 and 8 steps with DDIMScheduler, trailing,
    # guidance 0; the unified LoRA at 1 step with TCDScheduler, which starts at 999; the SDXL UNet
    # for 1 step with LCMScheduler and timesteps=[800], guidance 0.
    "Hyper-SD, 1 step LoRA": _evenly(1, 1.0),
    "Hyper-SD, 2 steps": _evenly(2, 0.0),
    "Hyper-SD, 4 steps": _evenly(4, 0.0),
    "Hyper-SD, 8 steps": _evenly(8, 0.0),
    "Hyper-SD, 1 step UNet": Recipe(timesteps=(999,), conditioning_timestep=800),
    # Model card of stabilityai/sdxl-turbo: num_inference_steps=1, guidance_scale=0, trailing. (More
    # steps use an ancestral sampler, which is another loop.)
    "SDXL-Turbo, 1 step": _evenly(1, 1.0),
}
FAMILY_NAMES = (FROM_FILE, *FAMILIES)


def recipe_for(model: Any, recipe: Recipe | None) -> Recipe | None:
    """The recipe that goes with ComfyUI's `model`: the connected one, else what the model carries.

    A model knows it from our loader, or (ComfyUI 0.30) from a stock loader's LoRA. ValueError if
    the metadata of that LoRA is damaged.
    """
    if recipe is not None:
        return recipe
    attached = _attachment(model, RECIPE_ATTACHMENT)
    if isinstance(attached, Recipe):
        return attached
    metadata = _attachment(model, METADATA_ATTACHMENT)
    return Recipe.from_metadata(metadata) if isinstance(metadata, Mapping) else None


def _attachment(model: Any, key: str) -> Any:
    """None where the host keeps no attachments."""
    get = getattr(model, "get_attachment", None)
    return None if get is None else get(key)


def of_file(metadata: Mapping[str, str] | None, family: str, model_sampling: Any) -> Recipe | None:
    """The recipe of a LoRA file: its own, or that of the `family` that the user chose.

    The families' LoRAs are used on models of either prediction, so a family takes the model's.
    """
    if family == FROM_FILE:
        return Recipe.from_metadata(metadata)
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}: choose one of {', '.join(FAMILY_NAMES)}")
    prediction = prediction_of(model_sampling) or "epsilon"
    zero_snr = prediction != "epsilon" and has_zero_snr(model_sampling)
    recipe = FAMILIES[family]
    return dataclasses.replace(recipe, prediction=prediction, zero_terminal_snr=zero_snr)


def disagreements(recipe: Recipe | None, model_sampling: Any) -> list[str]:
    """Where the model is not what the recipe's LoRA was trained on, one sentence each."""
    if recipe is None:
        return []
    found = []
    prediction = prediction_of(model_sampling)
    if prediction is not None and prediction != recipe.prediction:
        found.append(
            f"The LoRA was trained on a model with {recipe.prediction} prediction, this one uses "
            f"{prediction}: load the model it was made for, or set this one to "
            f"{recipe.prediction} prediction with ModelSamplingDiscrete."
        )
    if has_zero_snr(model_sampling) != recipe.zero_terminal_snr:
        trained = "with" if recipe.zero_terminal_snr else "without"
        found.append(
            f"The LoRA was trained {trained} zero terminal SNR, unlike this model: set zsnr "
            "accordingly in ModelSamplingDiscrete, or load the model it was made for."
        )
    return found


def check_fits(recipe: Recipe | None, model_sampling: Any) -> None:
    """ValueError if the recipe and the model that is about to be sampled contradict each other."""
    found = disagreements(recipe, model_sampling)
    if found:
        raise ValueError(" ".join(found))
