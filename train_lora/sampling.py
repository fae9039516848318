"""Images from a network in one of its roles: what validation, the demo and metrics all call."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

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
from .models.class_condition import AnyCondition
from .models.components import Components
from .models.placement import placed
from .models.roles import SharedUNet

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, AutoencoderTiny

log = logging.getLogger(__name__)

TEACHER_STEPS = 50
"""Steps of the teacher's own sampler (DDIM) where its images are made or shown."""
PASS_PX, VAE_ROWS = 1024 * 1024, 16
"""Most pixels that pass a network at once, and most pictures that pass the VAE: one of 1024x1024
needs no more memory than a training step, and fills a GPU."""


def rows_at_once(height_px: int, width_px: int) -> int:
    """How many pictures of this size are sampled together."""
    return max(1, PASS_PX // (height_px * width_px))


def vae_rows(height_px: int, width_px: int) -> int:
    """How many pictures of this size pass the VAE together."""
    return min(VAE_ROWS, rows_at_once(height_px, width_px))


def step_plan(config: Config) -> StepPlan:
    """The student's steps at inference, and in training unless it draws others (step_grids.py)."""
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
    condition: AnyCondition,
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
    Large pictures are drawn one after the other.
    """
    _, _, height, width = condition.latent_shape()
    rows = rows_at_once(components.latent_px * height, components.latent_px * width)
    if len(condition) > rows:
        parts = [
            sample_latents(
                unet, role, components, condition[first : first + rows], plan, seed=seed,
                first_index=first_index + first, guidance=guidance, strength=strength,
            )
            for first in range(0, len(condition), rows)
        ]  # fmt: skip
        return torch.cat(parts)
    eps = initial_noise(condition.latent_shape(), seed, first_index=first_index)
    eps = eps.to(condition.device)
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
def decode_latents(components: Components, latents: Tensor) -> Tensor:
    """Scaled latents (B, 4, h, w) to images (B, 3, 8h, 8w), float32 in [-1, 1].

    On the latents' device, or, where its memory does not suffice beside a training, on the CPU.
    """
    try:
        return _decoded(components, latents)
    except torch.OutOfMemoryError:
        pass  # what failed is freed with the exception, here
    log.info("the GPU has no room to decode pictures beside the training: the CPU does it")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return _decoded(components, latents.cpu()).to(latents.device)


def _decoded(components: Components, latents: Tensor) -> Tensor:
    vae = components.vae
    cell_px = components.latent_px
    rows = vae_rows(cell_px * latents.shape[2], cell_px * latents.shape[3])
    with placed(vae, latents.device):
        images = torch.cat([decode_rows(vae, chunk) for chunk in latents.split(rows)])
    return images.clamp(-1, 1)


def decode_rows(vae: AutoencoderKL | AutoencoderTiny, latents: Tensor) -> Tensor:
    """All rows at once, on the latents' device, with gradients: images float32, not clamped."""
    unscaled = (latents / vae.config.scaling_factor).to(vae.dtype)
    images: Tensor = vae.decode(unscaled, return_dict=False)[0]
    return images.float()


@torch.no_grad()
def encode_images(components: Components, images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in [-1, 1] to scaled latents (B, 4, H/8, W/8), float32.

    The posterior's mean, so that the same image always gives the same latent.
    """
    vae = components.vae
    chunks = images.to(vae.dtype).split(vae_rows(*images.shape[2:]))
    with placed(vae, images.device):
        latents = torch.cat([vae.encode(chunk).latent_dist.mean for chunk in chunks])
    return latents.float() * vae.config.scaling_factor
