"""The options of [distribution_matching] and [gan]: what the student learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .config_section import NUM_TIMESTEPS, Section, number


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionMatchingConfig(Section):
    section: ClassVar[str] = "distribution_matching"

    enabled: bool = True
    """Whether the distribution matching loss trains the student."""

    guidance: float = number(8.0, low=1, high=100)
    """Classifier-free guidance of the teacher's score, baked into the student; 1: no guidance."""

    guidance_weight: float = number(1.0, low=0, open_low=True)
    """Weight of what guidance adds to the gradient: the student is distilled with guidance 1 +
    `guidance_weight` x (`guidance` - 1), while the teacher draws with `guidance`."""

    guidance_timesteps: Literal["shared", "apart", "above"] = "shared"
    """Where what guidance adds is computed: at the timesteps of the comparison with the critic
    (DMD2), at some of its own, or at its own above the student's step (Decoupled DMD, arXiv
    2511.22677). Not "shared" costs two passes of the teacher."""

    min_timestep: int = number(20, low=0, high=NUM_TIMESTEPS - 1)
    """Smallest timestep at which teacher and critic are compared."""

    max_timestep: int = number(980, low=0, high=NUM_TIMESTEPS - 1)
    """Largest timestep at which teacher and critic are compared."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        if self.min_timestep > self.max_timestep:
            raise ValueError(
                f"distribution_matching.min_timestep is {self.min_timestep}, above max_timestep "
                f"{self.max_timestep}; set it to at most {self.max_timestep}."
            )

    @property
    def guidance_scale(self) -> float:
        """Guidance of the teacher's score in the gradient."""
        if self.guidance_weight == 1.0:
            return self.guidance
        return 1.0 + self.guidance_weight * (self.guidance - 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class GanConfig(Section):
    section: ClassVar[str] = "gan"

    enabled: bool = True
    """Whether a discriminator head on the critic's middle block compares with real images."""

    generator_weight: float = number(5e-3, low=0, open_low=True)
    """Weight of the GAN loss in the student's update."""

    critic_weight: float = number(1e-2, low=0, open_low=True)
    """Weight of the GAN loss in the critic's update, beside its denoising loss."""

    learning_rate: float = number(5e-5, low=0, high=1, open_low=True)
    """Learning rate of the discriminator head."""
