"""Health panels: what teacher and critic see in the same noised samples of the student.

Where they agree, distribution matching has nothing more to say. A critic that lags behind draws
what the student drew a while ago; one that has broken draws noise or gray.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2_core import SeededNoise, add_noise, guided

from .distill import Distiller
from .models.roles import CRITIC, TEACHER
from .models.text import Condition

COLUMNS = 4
"""Samples that are shown."""
PLACES = (0.25, 0.5, 0.75)
"""Of the range of timesteps in which distribution matching compares."""


def panel_timesteps(distiller: Distiller) -> list[int]:
    settings = distiller.config.distribution_matching
    low, high = settings.min_timestep, settings.max_timestep
    return sorted({round(low + place * (high - low)) for place in PLACES})


@torch.no_grad()
def panel_rows(
    distiller: Distiller, x0: Tensor, condition: Condition, *, seed: int, chunk: int
) -> list[tuple[str, Tensor]]:
    """(label, x0 (B, 4, H/8, W/8) on the CPU) of the sample itself and, for each timestep, of the
    teacher, guided as in training, and of the critic. In all processes, since all of them hold the
    networks; the noise is a function of `seed`."""
    rows = [("student's sample", x0.cpu())]
    for timestep in panel_timesteps(distiller):
        teacher, critic = [], []
        for first in range(0, len(x0), chunk):
            part = x0[first : first + chunk].to(condition.hidden.device)
            told = condition[first : first + chunk]
            # No plan has so many steps that its noise could be the same.
            eps = SeededNoise(seed, first)(1000 + timestep, part)
            t = torch.full((len(part),), timestep, device=part.device)
            x_t = add_noise(distiller.components.schedule, part, eps, t)
            with distiller.unet.role(TEACHER):
                score = guided(distiller.denoiser, distiller.config.distribution_matching.guidance)
                seen = score(x_t, t, told, distiller.components.unconditional(told))
                teacher.append(seen.cpu())
            with distiller.unet.role(CRITIC):
                critic.append(distiller.denoiser(x_t, t, told).cpu())
        rows.append((f"teacher, from t = {timestep}", torch.cat(teacher)))
        rows.append((f"critic, from t = {timestep}", torch.cat(critic)))
    return rows
