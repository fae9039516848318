"""The recipes of published few-step LoRAs, whose files say nothing about themselves.

What is listed follows each family's own instructions; what could not be established is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from .few_step import StepPlan
from .prediction import Prediction
from .recipe import Recipe


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


def family_recipe(
    family: str, prediction: Prediction = "epsilon", zero_terminal_snr: bool = False
) -> Recipe:
    """The recipe of `family` on a model of this prediction.

    These LoRAs were made on epsilon-predicting models and are used on others too.
    """
    if family not in FAMILIES:
        raise ValueError(f"family is {family!r}: choose one of {', '.join(FAMILIES)}")
    recipe = FAMILIES[family]
    return replace(recipe, prediction=prediction, zero_terminal_snr=zero_terminal_snr)
