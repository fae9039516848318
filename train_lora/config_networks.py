"""The options of [student] and [critic]: the two networks that are trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .config_section import Section, number


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentConfig(Section):
    section: ClassVar[str] = "student"

    kind: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA, or a full copy of the weights, which is exported as a checkpoint
    and as a LoRA extracted from it."""

    init: str | None = None
    """A few-step LoRA file to start from; "none": start from the teacher itself."""

    rank: int = number(64, low=1, high=4096)
    """Rank of the student's LoRA: the one that is exported; of full weights, the rank of the
    LoRA that is extracted."""

    alpha: float = number(8.0, low=0, open_low=True)
    """Scale of the student's LoRA: its output is multiplied by alpha / rank."""

    learning_rate: float = number(5e-5, low=0, high=1, open_low=True)
    """Learning rate of the student. It must learn more slowly than the critic follows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CriticConfig(Section):
    section: ClassVar[str] = "critic"

    kind: Literal["lora", "full"] = "lora"
    """What is trained: a LoRA on the shared base, or a full copy of the weights."""

    rank: int = number(64, low=1, high=4096)
    """Rank of the critic's LoRA; better not below the student's, since it tracks the student."""

    alpha: float = number(8.0, low=0, open_low=True)
    """Scale of the critic's LoRA: its output is multiplied by alpha / rank."""

    learning_rate: float = number(5e-5, low=0, high=1, open_low=True)
    """Learning rate of the critic."""

    loss_space: Literal["prediction", "velocity"] = "prediction"
    """Where the critic's denoising error is counted: in what the network predicts (the paper), or
    as velocity, where the errors of an epsilon model at high noise, in layout and colours, weigh
    more. A v or flow model predicts velocity anyway."""

    betas: tuple[float, float] | None = number(None, low=0, high=1, open_high=True)
    """AdamW's two decay rates for critic and discriminator; "none": `training.betas`."""

    updates_per_generator: int = number(5, low=1, high=1000)
    """Critic updates for each student update: the student is updated every so many iterations."""

    warmup_iterations: int = number(0, low=0)
    """Iterations at the start that update the critic alone."""
