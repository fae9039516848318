"""The options of [diversity_anchor]: what the student's first step learns from the teacher."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .config_section import NUM_TIMESTEPS, Section, number


@dataclass(frozen=True, kw_only=True, slots=True)
class DiversityAnchorConfig(Section):
    section: ClassVar[str] = "diversity_anchor"

    weight: float = number(0.0, low=0)
    """Weight of the first step's squared error against where the teacher leads the same noise
    (DP-DMD, arXiv 2602.03139, takes 0.05). Above 0 that is all the first step learns from: the
    other losses train the later ones. 0: no anchor (DMD2)."""

    timestep: int | None = number(None, low=1, high=NUM_TIMESTEPS - 2)
    """How far the teacher leads: smaller, and the first step's image is closer to the teacher's
    finished one; "none": to the student's second timestep."""

    teacher_steps: int = number(6, low=1, high=NUM_TIMESTEPS - 2)
    """Steps of its deterministic sampler (DDIM) on the way, evenly spaced; guidance is
    distribution matching's. Each is two passes in every update of the student."""
