"""Health panels: what teacher and critic see in the same noised samples of the student.

Where they agree, distribution matching has nothing more to say. A critic that lags behind draws
what the student drew a while ago; one that has broken draws noise or gray.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dmd2_core import SeededNoise, add_noise, guided

from .distill import Distiller
from .distributed import shared_out
from .models.class_condition import AnyCondition
from .models.roles import CRITIC, TEACHER

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
    distiller: Distiller, x0: Tensor, condition: AnyCondition, *, seed: int, piece_rows: int
) -> list[tuple[str, Tensor]]:
    """(label, x0 (B, 4, H/8, W/8) on the CPU) of the sample itself and, for each timestep, of the
    teacher, guided as in training, and of the critic. In all processes, which share the work
    (`piece_rows` samples at a time); the noise is a function of `seed`."""
    timesteps, device = panel_timesteps(distiller), condition.device
    score = guided(distiller.denoiser, distiller.config.distribution_matching.guidance_scale)

    def seen(piece: tuple[int, slice, slice]) -> Tensor:
        """By teacher and critic: (2, b, 4, H/8, W/8)."""
        timestep, rows = timesteps[piece[0]], piece[2]
        part, told = x0[rows].to(device), condition[rows]
        # No plan has so many steps that its noise could be the same.
        eps = SeededNoise(seed, rows.start)(1000 + timestep, part)
        t = torch.full((len(part),), timestep, device=device)
        x_t = add_noise(distiller.components.schedule, part, eps, t)
        with distiller.unet.role(TEACHER):
            teacher = score(x_t, t, told, distiller.components.unconditional(told))
        with distiller.unet.role(CRITIC):
            return torch.stack([teacher, distiller.denoiser(x_t, t, told)])

    pieces = [
        (place, slice(None), slice(first, first + piece_rows))
        for place in range(len(timesteps))
        for first in range(0, len(x0), piece_rows)
    ]
    into = torch.zeros(len(timesteps), 2, *x0.shape, device=device)
    found = shared_out(pieces, seen, into, together=distiller.unet.needs_all_processes).cpu()
    rows = [("student's sample", x0.cpu())]
    for timestep, (teacher, critic) in zip(timesteps, found, strict=True):
        rows.append((f"teacher, from t = {timestep}", teacher))
        rows.append((f"critic, from t = {timestep}", critic))
    return rows
