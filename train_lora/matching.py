"""The distribution matching gradient: teacher against critic, with its guidance joint or apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmd2_core import (
    add_noise,
    both_branches,
    classifier_free_guidance,
    distribution_matching_gradient,
    guided,
)

from .draws import Draws, randn_like, random_timesteps

if TYPE_CHECKING:
    from .distill import Distiller, StudentSample


@torch.no_grad()
def matching_gradient(distiller: Distiller, sample: StudentSample, draws: Draws) -> Tensor:
    """The direction at the detached `sample` (B, 4, H/8, W/8), as config says; through no score.

    "shared" is DMD2: the guided teacher against the critic on the same noised samples. Otherwise
    two terms, each at times and noise of its own (Decoupled DMD, arXiv 2511.22677): the teacher
    without guidance against the critic, and the teacher with guidance against itself without.
    At the same x_t the two would add up to the joint one, but for each term's own normalisation.
    """
    settings = distiller.config.distribution_matching
    low, high = settings.min_timestep, settings.max_timestep
    if settings.guidance_timesteps == "shared":
        return _against_critic(distiller, sample, settings.guidance_scale, draws)
    if settings.guidance_timesteps == "above":
        low = min(max(low, sample.timestep), high)
    matching = _against_critic(distiller, sample, 1.0, draws)
    return matching + _guidance_term(distiller, sample, low, high, draws)


def _against_critic(
    distiller: Distiller, sample: StudentSample, guidance: float, draws: Draws
) -> Tensor:
    """The teacher with `guidance` against the critic, on the same noised samples, weighted as
    `divergence` wants it."""
    settings = distiller.config.distribution_matching
    x, condition = sample.x0.detach(), sample.condition
    x_t, t = _noised(distiller, x, settings.min_timestep, settings.max_timestep, draws)
    with distiller.unet.role("teacher"):
        teacher = guided(distiller.denoiser, guidance)
        x0_real = teacher(x_t, t, condition, distiller.components.unconditional(condition))
    with distiller.unet.role("critic"):
        x0_fake = distiller.denoiser(x_t, t, condition)
    gradient = distribution_matching_gradient(x, x0_real, x0_fake)
    return distiller.adversary.weighted(gradient, x_t, t, condition)


def _guidance_term(
    distiller: Distiller, sample: StudentSample, low: int, high: int, draws: Draws
) -> Tensor:
    """(scale - 1) * (unconditional - conditional), normalised as if against the guided teacher."""
    x, condition = sample.x0.detach(), sample.condition
    x_t, t = _noised(distiller, x, low, high, draws)
    with distiller.unet.role("teacher"):
        teacher = both_branches(distiller.denoiser)
        unconditional = distiller.components.unconditional(condition)
        x0_cond, x0_uncond = teacher(x_t, t, condition, unconditional)
    scale = distiller.config.distribution_matching.guidance_scale
    x0_guided = classifier_free_guidance(x0_cond, x0_uncond, scale)
    return distribution_matching_gradient(x, x0_guided, x0_cond)


def _noised(
    distiller: Distiller, x: Tensor, low: int, high: int, draws: Draws
) -> tuple[Tensor, Tensor]:
    """x_t and t ~ U{low..high}, one for each sample."""
    t = random_timesteps(low, high, x, draws)
    return add_noise(distiller.components.schedule, x, randn_like(x, draws), t), t
