"""Images from a network in one of its roles: what validation, the demo and metrics all call."""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2_core import (
    Denoiser,
    SeededNoise,
    StepPlan,
    few_step_sample,
    guided,
    initial_noise,
    initial_sample,
)

from .config import Config
from .models.components import Components
from .models.placement import placed
from .models.roles import SharedUNet
from .models.text import Condition

TEACHER_STEPS = 50
"""Steps of the teacher's own sampler (DDIM) where its images are made or shown."""


def step_plan(config: Config) -> StepPlan:
    """The student's steps, in training and at inference."""
    sampling = config.sampling
    if sampling.timesteps:
        return StepPlan(
            timesteps=sampling.timesteps, conditioning_timestep=sampling.conditioning_timestep
        )
    return StepPlan.evenly(sampling.steps, conditioning_timestep=sampling.conditioning_timestep)


@torch.no_grad()
def sample_latents(
    unet: SharedUNet,
    role: str,
    components: Components,
    condition: Condition,
    plan: StepPlan,
    *,
    seed: int,
    first_index: int = 0,
    guidance: float = 1.0,
    strength: float = 1.0,
) -> Tensor:
    """The role's latents for B prompts: (B, 4, H/8, W/8) float32, sizes from the condition's ids.

    Image i starts from the noise of (seed, first_index + i) whatever the role and the plan, so
    networks can be compared side by side. `strength` 0 is deterministic DDIM (the teacher's
    sampler), 1 is DMD2; `guidance` above 1 calls the network for the unconditional branch as well.
    """
    eps = initial_noise(condition.latent_shape(), seed, first_index=first_index)
    eps = eps.to(condition.hidden.device)
    unconditional = components.unconditional(condition)
    denoise = guided(Denoiser(unet, components.schedule, components.prediction), guidance)
    with unet.role(role):
        return few_step_sample(
            lambda x_t, t: denoise(x_t, t, condition, unconditional),
            initial_sample(components.schedule, plan, eps),
            components.schedule,
            plan,
            noise=SeededNoise(seed, first_index),
            strength=strength,
        )


@torch.no_grad()
def decode_latents(components: Components, latents: Tensor, batch: int = 16) -> Tensor:
    """Scaled latents (B, 4, h, w) to images (B, 3, 8h, 8w), float32 in [-1, 1]."""
    vae = components.vae
    chunks = (latents / vae.config.scaling_factor).to(vae.dtype).split(batch)
    with placed(vae, latents.device):
        images = torch.cat([vae.decode(chunk, return_dict=False)[0] for chunk in chunks])
    return images.float().clamp(-1, 1)


@torch.no_grad()
def encode_images(components: Components, images: Tensor, batch: int = 16) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, 4, H/8, W/8), float32.

    The posterior's mean, so that the same image always gives the same latent.
    """
    vae = components.vae
    chunks = images.to(vae.dtype).split(batch)
    with placed(vae, images.device):
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks])
    return latents.float() * vae.config.scaling_factor
