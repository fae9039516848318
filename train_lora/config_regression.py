"""The options of [regression]: the teacher's own images as what the student should draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .config_section import Section, number


@dataclass(frozen=True, kw_only=True, slots=True)
class RegressionConfig(Section):
    section: ClassVar[str] = "regression"

    warmup_iterations: int = number(0, low=0)
    """Iterations at the start that train the student on the teacher's pairs alone, before any
    critic: the paper's first stage of one-step SDXL. They count in `training.iterations`."""

    learning_rate: float = number(1e-5, low=0, high=1, open_low=True)
    """Learning rate of the student in these iterations."""

    weight: float = number(0.25, low=0, open_low=True)
    """Weight of the regression loss beside distribution matching, with training.objective "dmd"."""

    pairs: str | None = None
    """Folder of (noise, teacher image) pairs that `dmd2 pairs` fills."""

    num_pairs: int = number(10_000, low=1)
    """How many pairs the teacher makes."""

    teacher_steps: int = number(50, low=1, high=1000)
    """Steps of its deterministic sampler (DDIM) for each; guidance is distribution matching's."""
