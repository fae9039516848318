"""Grids of validation images: the same prompts and noise through teacher and student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from dmd2_core import StepPlan

from .average import WeightAverage
from .config import Config
from .data.training_data import encode_captions
from .distill import Distiller
from .models.roles import STUDENT, TEACHER
from .pictures import labelled_grid
from .sampling import TEACHER_STEPS, decode_latents, sample_latents

if TYPE_CHECKING:
    from PIL.Image import Image


class Validation:
    """Draws the grid when it is due; the teacher's row is drawn once and kept."""

    def __init__(
        self, *, config: Config, distiller: Distiller, captions: Sequence[str],
        average: WeightAverage,
    ) -> None:  # fmt: skip
        settings = config.validation
        self.config, self.distiller, self.average = config, distiller, average
        prompts = settings.prompts or captions[: settings.num_prompts]
        self.condition = encode_captions(distiller.components, prompts, config.data.resolution_px)
        self._teacher_row: Tensor | None = None

    def is_due(self, iteration: int) -> bool:
        """After every `validation.every` iterations, counted from 1."""
        every = self.config.validation.every
        return every > 0 and (iteration + 1) % every == 0

    def grid(self) -> Image:
        """Teacher in 50 guided steps above the averaged student in its own steps."""
        distiller, seed = self.distiller, self.config.validation.seed
        if self._teacher_row is None:
            self._teacher_row = self._draw(
                TEACHER,
                StepPlan.evenly(TEACHER_STEPS),
                seed=seed,
                guidance=self.config.distribution_matching.guidance,
                strength=0.0,
            )
        with self.average.applied():
            student = self._draw(STUDENT, distiller.plan, seed=seed)
        steps = len(distiller.plan.timesteps)
        return labelled_grid(
            [
                (f"teacher, {TEACHER_STEPS} steps", self._teacher_row),
                (f"student, {steps} steps", student),
            ]
        )

    def _draw(self, role: str, plan: StepPlan, **options: float | int) -> Tensor:
        distiller = self.distiller
        latents = sample_latents(
            distiller.unet, role, distiller.components, self.condition, plan, **options
        )
        return decode_latents(distiller.components, latents)
