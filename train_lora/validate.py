"""Validation: the same prompts and noise through teacher and student, as pictures and figures.

The processes share the sampling; the main one decodes, measures and draws. Nothing here changes the
training: no random state, no weights.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dmd2_core import StepPlan

from .average import WeightAverage
from .config import Config
from .data.training_data import encode_captions
from .distill import Distiller
from .distributed import largest, shared_out
from .metrics.diversity import diversity
from .metrics.looks import energy_distance, looks, ratio, statistics_distance, thumbnails
from .models.roles import STUDENT, TEACHER
from .models.safetensors_io import read_safetensors, write_safetensors
from .panels import COLUMNS, panel_rows
from .pictures import labelled_grid
from .sampling import TEACHER_STEPS, decode_latents, rows_at_once, sample_latents

if TYPE_CHECKING:
    from PIL.Image import Image

TEACHER_FILE = "teacher_samples.safetensors"
SHOWN_PER_PROMPT = 2
"""Rows of each network in the grid, however many pictures of a prompt are measured."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationResult:
    """What one validation found."""

    figures: dict[str, float]
    """Name, such as "validation/diversity", -> value."""
    pictures: dict[str, Image]
    """"samples" and, where they are drawn, "panels"."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Drawn:
    """One network's pictures of all prompts, and what they look like."""

    images: Tensor
    """(P * S, 3, H, W) in [-1, 1], on the CPU: S pictures of the first prompt, of the second..."""
    thumbnails: Tensor
    """(P, S, D)."""
    figures: dict[str, float]
    latent_mean: float


class Validation:
    """Draws when it is due; the teacher's part once for a run, kept in its folder."""

    def __init__(
        self, *, config: Config, distiller: Distiller, captions: Sequence[str],
        average: WeightAverage, is_main_process: bool = True,
    ) -> None:  # fmt: skip
        settings = config.validation
        self.config, self.distiller, self.average = config, distiller, average
        self.is_main_process = is_main_process
        self.prompts = list(settings.prompts or captions[: settings.num_prompts])
        condition = encode_captions(distiller.components, self.prompts, config.data.resolution_px)
        rows = torch.arange(len(self.prompts)).repeat_interleave(settings.images_per_prompt)
        self.condition = condition[rows]
        self._teacher: _Drawn | None = None
        self._knows_teacher = False

    def is_due(self, iteration: int) -> bool:
        """After every `validation.every` iterations; `iteration`: those done."""
        every = self.config.validation.every
        return every > 0 and iteration % every == 0

    @property
    def stamp(self) -> str:
        """Of all that the teacher's pictures depend on: figures of equal stamps can be compared."""
        components, settings = self.distiller.components, self.config.validation
        facts = (
            *(self.prompts, settings.seed, settings.images_per_prompt, TEACHER_STEPS),
            *(self.config.data.resolution_px, self.config.distribution_matching.guidance),
            *(components.base_hash, components.prediction, self.config.model.base_precision),
            components.schedule.has_zero_terminal_snr,
        )
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

    @torch.no_grad()
    def run(self) -> ValidationResult | None:
        """Draw and measure, all processes together; the result is the main one's, others get None.

        The averaged student is judged: it is what is exported.
        """
        self._learn_teacher()
        with self.average.applied():
            latents = self._draw(STUDENT, self.distiller.plan)
        rows: list[tuple[str, Tensor]] = []
        if self.config.validation.panels and self.config.distribution_matching.enabled:
            per_prompt = self.config.validation.images_per_prompt
            chosen = slice(0, COLUMNS * per_prompt, per_prompt)
            rows = panel_rows(
                self.distiller,
                latents[chosen],
                self.condition[chosen],
                seed=self.config.validation.seed,
                piece_rows=self._piece_rows,
            )
        if not self.is_main_process:
            return None
        assert self._teacher is not None
        student = self._measured(latents)
        pictures = {"samples": self._grid(self._teacher, student)}
        if rows:
            shown = [(label, self._decoded(part)) for label, part in rows]
            pictures["panels"] = labelled_grid(shown, self.prompts[:COLUMNS])
        return ValidationResult(figures=_compared(self._teacher, student), pictures=pictures)

    def _learn_teacher(self) -> None:
        """The teacher's pictures, from the run's folder if it has them; all processes alike."""
        if self._knows_teacher:
            return
        file = Path(self.config.output.directory) / TEACHER_FILE
        kept = self._kept(file) if self.is_main_process else None
        if largest(int(kept is not None), self.condition.device) == 0:
            guidance = self.config.distribution_matching.guidance
            plan = StepPlan.evenly(TEACHER_STEPS)
            kept = self._draw(TEACHER, plan, guidance=guidance, strength=0.0)
            if self.is_main_process:
                write_safetensors(file, {"latents": kept}, {"made_for": self.stamp})
        if self.is_main_process:
            assert kept is not None
            self._teacher = self._measured(kept)
        self._knows_teacher = True

    def _kept(self, file: Path) -> Tensor | None:
        """What an earlier process of this run drew; None if it was for other settings."""
        if not file.exists():
            return None
        try:
            tensors, metadata = read_safetensors(file)
        except ValueError:  # cut short, say: then it is drawn again
            return None
        return tensors["latents"] if metadata.get("made_for") == self.stamp else None

    def _draw(self, role: str, plan: StepPlan, **options: float) -> Tensor:
        """Latents (P * S, 4, H/8, W/8) on the CPU, in all processes, which share the work."""
        unet, count, rows = self.distiller.unet, len(self.condition), self._piece_rows

        def draw(piece: slice) -> Tensor:
            return sample_latents(
                unet, role, self.distiller.components, self.condition[piece], plan,
                seed=self.config.validation.seed, first_index=piece.start, **options,
            )  # fmt: skip

        pieces = [slice(first, min(first + rows, count)) for first in range(0, count, rows)]
        into = torch.zeros(self.condition.latent_shape(), device=self.condition.device)
        return shared_out(pieces, draw, into, together=unet.needs_all_processes).cpu()

    @property
    def _piece_rows(self) -> int:
        """How many pictures a process makes together, whatever the number of processes: the last
        bits depend on it."""
        _, _, height, width = self.condition.latent_shape()
        cell_px = self.distiller.components.latent_px
        return rows_at_once(cell_px * height, cell_px * width)

    def _decoded(self, latents: Tensor) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] on the CPU."""
        device = self.condition.device
        return decode_latents(self.distiller.components, latents.to(device)).cpu()

    def _measured(self, latents: Tensor) -> _Drawn:
        images = self._decoded(latents)
        small = thumbnails(images).view(len(self.prompts), -1, thumbnails(images[:1]).shape[1])
        figures = looks(images) | {
            "diversity": diversity(small),
            "latent_deviation": float(latents.std()),
        }
        return _Drawn(
            images=images, thumbnails=small, figures=figures, latent_mean=float(latents.mean())
        )

    def _grid(self, teacher: _Drawn, student: _Drawn) -> Image:
        """For each seed, the teacher's row above the student's; a column for each prompt."""
        steps = len(self.distiller.plan.timesteps)
        per_prompt = self.config.validation.images_per_prompt
        rows = []
        for which in range(min(SHOWN_PER_PROMPT, per_prompt)):
            rows.append((f"teacher, {TEACHER_STEPS} steps", teacher.images[which::per_prompt]))
            rows.append((f"student, {steps} steps", student.images[which::per_prompt]))
        return labelled_grid(rows, self.prompts)


def _compared(teacher: _Drawn, student: _Drawn) -> dict[str, float]:
    """The student's figures, the teacher's, their ratios, and what checkpoints are chosen by."""
    ratios = {name: ratio(student.figures[name], teacher.figures[name]) for name in teacher.figures}
    named = dict(student.figures)
    named |= {f"{name}_teacher": value for name, value in teacher.figures.items()}
    named |= {f"{name}_ratio": value for name, value in ratios.items()}
    named |= {"latent_mean": student.latent_mean, "latent_mean_teacher": teacher.latent_mean}
    named |= {
        "picture_distance": energy_distance(student.thumbnails, teacher.thumbnails),
        "statistics_distance": statistics_distance(ratios),
        "diversity_gap": statistics_distance({"diversity": ratios["diversity"]}),
    }
    return {f"validation/{name}": value for name, value in named.items()}
