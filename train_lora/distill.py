"""DMD2 on one screen: the generator step and the critic step (arXiv 2405.14867, algorithm 1).

The steps compute gradients and return what happened; the loop (`loop.py`) owns the order, the
optimizers, logging and saving. The objective speaks in sample gradients: the student's sample is
detached, every loss gives its gradient there while its own network is active, and the sum goes
through the student with one `backward`. No role is switched between a forward and its backward.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dmd2_core import (
    Denoiser,
    StepPlan,
    add_noise,
    coefficients,
    denoising_loss,
    distribution_matching_gradient,
    distribution_matching_loss,
    few_step_sample,
    from_x0,
    gan_critic_loss,
    gan_generator_loss,
    guided,
    initial_sample,
    regression_loss,
    sample_gradient,
    to_x0,
)

from .config import Config
from .draws import Draws, randn_like, random_timesteps
from .models.components import Components
from .models.roles import SharedUNet
from .models.text import Condition

Figures = dict[str, Tensor]
"""Name -> scalar tensor (detached); fetched by the loop only when it logs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RealImages:
    """Real images for the discriminator, with their own captions."""

    latents: Tensor
    """Scaled: (B, 4, H/8, W/8), float32."""
    condition: Condition


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """What one iteration consumes; conditions and latents on the training device."""

    condition: Condition
    """Prompts for the student's samples, B rows."""
    real: RealImages | None = None
    """B real images; None where neither the GAN nor the student's input needs them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """What the teacher made of noise, deterministically: B rows each."""

    noise: Tensor
    """Unit Gaussian, (B, 4, H/8, W/8)."""
    latents: Tensor
    """Scaled, of the noise's shape, float32."""
    condition: Condition


@dataclass(frozen=True, kw_only=True, slots=True)
class StudentSample:
    """The student's images of one iteration and the prompts that they answer."""

    x0: Tensor
    """(B, 4, H/8, W/8); with its graph if the generator is updated, else detached."""
    condition: Condition

    def detached(self) -> StudentSample:
        return StudentSample(x0=self.x0.detach(), condition=self.condition)


@dataclass(frozen=True, kw_only=True)
class Distiller:
    """The networks in their roles, and the losses between them."""

    unet: SharedUNet
    head: nn.Module
    """Discriminator head on the critic's middle-block features."""
    components: Components
    plan: StepPlan
    """The student's steps: those for inference, or those that an iteration drew."""
    config: Config
    denoiser: Denoiser[Condition] = field(init=False)

    def __post_init__(self) -> None:
        denoiser = Denoiser(self.unet, self.components.schedule, self.components.prediction)
        object.__setattr__(self, "denoiser", denoiser)

    # -- the student ------------------------------------------------------------------------------

    def student_sample(
        self, batch: Batch, step: int, draws: Draws, *, with_graph: bool
    ) -> StudentSample:
        """One student call at `plan.timesteps[step]`, on the input that inference would give it."""
        with self.unet.role("student"):
            with torch.no_grad():
                x_t, condition = self._student_input(batch, step, draws)
            t = self.plan.times(self.plan.told(step), x_t)
            with torch.set_grad_enabled(with_graph):
                return StudentSample(x0=self.denoiser(x_t, t, condition), condition=condition)

    def _student_input(self, batch: Batch, step: int, draws: Draws) -> tuple[Tensor, Condition]:
        """Backward simulation (sec. 4.5), or, in the ablation, a noised real latent."""
        schedule, hidden = self.components.schedule, batch.condition.hidden
        eps = randn_like(hidden.new_empty(batch.condition.latent_shape()), draws)
        if not self.config.backward_simulation.enabled:
            assert batch.real is not None
            t = self.plan.times(self.plan.timesteps[step], eps)
            return add_noise(schedule, batch.real.latents, eps, t), batch.real.condition
        x_t = few_step_sample(
            lambda x, t: self.denoiser(x, t, batch.condition),
            initial_sample(schedule, self.plan, eps),
            schedule,
            self.plan,
            noise=lambda _, like: randn_like(like, draws),
            stop=step,
        )
        return x_t, batch.condition

    def generator_step(
        self, sample: StudentSample, draws: Draws, pairs: Pairs | None = None
    ) -> Figures:
        """Accumulate the student's gradient at `sample` (eq. 2 and its own part of eq. 4).

        `pairs`: of the first paper's objective, for the regression loss beside these.
        """
        x = sample.x0.detach()
        total = torch.zeros_like(x, dtype=torch.float32)
        figures: Figures = {}
        if self.config.distribution_matching.enabled:
            direction = self._matching_gradient(x, sample.condition, draws)
            loss, gradient = sample_gradient(lambda s: distribution_matching_loss(s, direction), x)
            total += gradient
            figures |= {"loss/matching": loss, "gradient/matching": gradient.norm()}
        if self.config.gan.enabled:
            with self.unet.role("critic"):
                loss, gradient = sample_gradient(
                    lambda s: gan_generator_loss(self._logits(s, sample.condition, draws)), x
                )
            gradient = self.config.gan.generator_weight * gradient
            total += gradient
            figures |= {"loss/gan_generator": loss, "gradient/gan": gradient.norm()}
        with self.unet.role("student"):  # checkpointing recomputes the forward in here
            sample.x0.backward(total.to(sample.x0.dtype))
        if pairs is not None:
            figures |= self.regression_step(pairs, self.config.regression.weight)
        return figures

    def regression_step(self, pairs: Pairs, weight: float = 1.0) -> Figures:
        """Accumulate the student's gradient towards the teacher's images (arXiv 2311.18828, 3.2).

        From the same noise, in one step: with the time told, and the coefficients, of inference.
        """
        x = initial_sample(self.components.schedule, self.plan, pairs.noise)
        t = self.plan.times(self.plan.told(0), x)
        with self.unet.role("student"):
            loss = regression_loss(self.denoiser(x, t, pairs.condition), pairs.latents)
            (weight * loss).backward()
        return {"loss/regression": loss.detach()}

    @torch.no_grad()
    def _matching_gradient(self, x: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Teacher against critic on the same noised samples; no gradient through any score."""
        settings = self.config.distribution_matching
        t = random_timesteps(settings.min_timestep, settings.max_timestep, x, draws)
        x_t = add_noise(self.components.schedule, x, randn_like(x, draws), t)
        with self.unet.role("teacher"):
            teacher = guided(self.denoiser, settings.guidance)
            x0_real = teacher(x_t, t, condition, self.components.unconditional(condition))
        with self.unet.role("critic"):
            x0_fake = self.denoiser(x_t, t, condition)
        return distribution_matching_gradient(x, x0_real, x0_fake)

    # -- the critic -------------------------------------------------------------------------------

    def critic_step(self, sample: StudentSample, batch: Batch, draws: Draws) -> Figures:
        """Accumulate the gradients of the critic (eq. 3) and of the discriminator (eq. 4)."""
        x = sample.x0.detach()
        figures: Figures = {"sample/mean": x.mean(), "sample/deviation": x.std()}
        with self.unet.role("critic"):  # one graph after the other: both at once need more memory
            if self.config.distribution_matching.enabled:
                denoising = self._denoising_loss(x, sample.condition, draws)
                denoising.backward()
                figures["loss/critic"] = denoising.detach()
            if self.config.gan.enabled:
                assert batch.real is not None
                both = torch.cat([batch.real.latents, x])
                captions = Condition.cat([batch.real.condition, sample.condition])
                real, fake = self._logits(both, captions, [*draws, *draws]).chunk(2)
                gan = gan_critic_loss(real, fake)
                (self.config.gan.critic_weight * gan).backward()
                figures |= {
                    "real/mean": batch.real.latents.mean(),
                    "real/deviation": batch.real.latents.std(),
                    "loss/gan_critic": gan.detach(),
                    "discriminator/real_accuracy": (real > 0).float().mean(),
                    "discriminator/fake_accuracy": (fake < 0).float().mean(),
                }
        return figures

    def _denoising_loss(self, x: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """How well the critic denoises the student's samples, in `critic.loss_space`."""
        schedule, prediction = self.components.schedule, self.components.prediction
        t = random_timesteps(0, schedule.num_timesteps - 1, x, draws)
        eps = randn_like(x, draws)
        x_t, coefficients_t = add_noise(schedule, x, eps, t), coefficients(schedule, t, x)
        output = self.unet(x_t, t, condition)
        if self.config.critic.loss_space == "velocity":
            x0 = to_x0(prediction, output.float(), x_t, *coefficients_t)
            prediction, output = "v", from_x0("v", x0, x_t, *coefficients_t)
        return denoising_loss(prediction, output, x, eps, *coefficients_t)

    def _logits(self, x: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """The discriminator on `x`, noised at random times (sec. 4.3): (B,). As the critic."""
        schedule = self.components.schedule
        t = random_timesteps(0, schedule.num_timesteps - 1, x, draws)
        x_t = add_noise(schedule, x, randn_like(x, draws), t)
        logits: Tensor = self.head(self.unet.features(x_t, t, condition))
        return logits
