"""The options of [distribution_matching] and [gan]: what the student learns from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from .config_section import NUM_TIMESTEPS, Section, number, show_value


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

    divergence: Literal["reverse-kl", "softened-reverse-kl", "jensen-shannon", "forward-kl"] = (
        "reverse-kl"
    )
    """Which divergence from the real images is made small (arXiv 2502.15681). All but "reverse-kl"
    (the paper) weight each sample by what the discriminator makes of it, so they need the GAN.
    "jensen-shannon" and, more so, "forward-kl" seek few modes less, "softened-reverse-kl" more."""

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
    """Whether a discriminator compares the student's images with real ones."""

    generator_weight: float = number(5e-3, low=0, open_low=True)
    """Weight of the GAN loss in the student's update."""

    critic_weight: float = number(1e-2, low=0, open_low=True)
    """Weight of the GAN loss in the critic's update, beside its denoising loss."""

    learning_rate: float = number(5e-5, low=0, high=1, open_low=True)
    """Learning rate of the discriminator head."""

    features: Literal["critic", "teacher"] = "critic"
    """Whose features the discriminator's head reads: the critic's (the paper), which the GAN loss
    trains as well, or the frozen teacher's; then the GAN loss trains the head alone."""

    layers: tuple[Literal["middle", "down1", "down2", "down3", "down4", "all"], ...] = ("middle",)
    """Which feature maps the discriminator sees: that of the middle block (the paper) and of the
    down blocks, by name, each with a head of its own, whose logits are averaged; "all" alone:
    all that the model has (SDXL 3 down blocks, SD1.5 4)."""

    r1_weight: float = number(0.0, low=0)
    """Weight, beside the GAN loss in the critic's update, of the squared difference of the logits
    of real images and of the same with a little noise (approximate R1); 0: none. Published: 100."""

    r1_noise: float = number(0.01, low=0, high=1, open_low=True)
    """Deviation of that noise, in scaled latents, before the noise of the diffusion."""

    shared_draw: bool = False
    """Whether the discriminator judges the student's images on the noise of the critic's denoising
    pass and by that pass, in place of one of its own."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        names = self.layers
        if not names or len(set(names)) < len(names) or ("all" in names and len(names) > 1):
            raise ValueError(
                f'gan.layers is {show_value(names)}; name each layer once, such as ["down2", '
                '"middle"], or "all" alone.'
            )
