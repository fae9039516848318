"""DMD2 on one screen: the generator step and the critic step (arXiv 2405.14867, algorithm 1).

The steps compute gradients and return what happened; the loop (`loop.py`) owns the order, the
optimizers, logging and saving. The objective speaks in sample gradients: the student's sample is
detached, every loss gives its gradient there while its own network is active, and the sum goes
through the student with one `backward`. No role is switched between a forward and its backward.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dmd2_core import (
    Denoiser,
    StepPlan,
    add_noise,
    coefficients,
    denoising_loss,
    distribution_matching_loss,
    few_step_sample,
    from_x0,
    gan_fake_loss,
    guided,
    initial_sample,
    regression_loss,
    sample_gradient,
    to_x0,
)

from .adversary import Adversary
from .anchor import anchor_plan, anchor_target
from .config import Config
from .draws import Draws, randn_like, random_timesteps
from .matching import matching_gradient
from .models.class_condition import AnyCondition as Condition
from .models.components import Components
from .models.roles import SharedUNet
from .regression_losses import RegressionLoss, squared_error

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
    timestep: int
    """Of the step that made them: how noisy the student's input was."""

    def detached(self) -> StudentSample:
        return replace(self, x0=self.x0.detach())


@dataclass(frozen=True, kw_only=True)
class Distiller:
    """The networks in their roles, and the losses between them."""

    unet: SharedUNet
    head: nn.Module
    """The discriminator's, of `adversary.build_head`."""
    components: Components
    plan: StepPlan
    """The student's steps: those for inference, or those that an iteration drew."""
    config: Config
    regression: RegressionLoss = squared_error
    """How far one step is from the teacher's image, in `regression.loss`."""
    denoiser: Denoiser[Condition] = field(init=False)
    anchor: StepPlan | None = field(init=False)
    """How the teacher leads the student's first step; None without a diversity anchor."""
    adversary: Adversary = field(init=False)

    def __post_init__(self) -> None:
        denoiser = Denoiser(self.unet, self.components.schedule, self.components.prediction)
        object.__setattr__(self, "denoiser", denoiser)
        object.__setattr__(self, "anchor", self._anchor_of(self.plan))
        adversary = Adversary(
            unet=self.unet,
            head=self.head,
            schedule=self.components.schedule,
            settings=self.config.gan,
            divergence=self.config.distribution_matching.divergence,
        )
        object.__setattr__(self, "adversary", adversary)

    def at(self, plan: StepPlan) -> Distiller:
        """This one with other steps of the student; networks and losses are shared."""
        other = copy(self)
        object.__setattr__(other, "plan", plan)
        object.__setattr__(other, "anchor", self._anchor_of(plan))
        return other

    def _anchor_of(self, plan: StepPlan) -> StepPlan | None:
        settings = self.config.diversity_anchor
        return anchor_plan(settings, plan) if settings.weight > 0 else None

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
                x0 = self.denoiser(x_t, t, condition)
        return StudentSample(x0=x0, condition=condition, timestep=int(self.plan.timesteps[step]))

    def _student_input(self, batch: Batch, step: int, draws: Draws) -> tuple[Tensor, Condition]:
        """Backward simulation (sec. 4.5), or, in the ablation, a noised real latent."""
        schedule, condition = self.components.schedule, batch.condition
        eps = randn_like(torch.empty(condition.latent_shape(), device=condition.device), draws)
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
            direction = matching_gradient(self, sample, draws)
            loss, gradient = sample_gradient(lambda s: distribution_matching_loss(s, direction), x)
            total += gradient
            figures |= {"loss/matching": loss, "gradient/matching": gradient.norm()}
        if self.config.gan.enabled:
            loss, gradient = self.adversary.generator_gradient(x, sample.condition, draws)
            gradient = self.config.gan.generator_weight * gradient
            total += gradient
            figures |= {"loss/gan_generator": loss, "gradient/gan": gradient.norm()}
        with self.unet.role("student"):  # checkpointing recomputes the forward in here
            sample.x0.backward(total.to(sample.x0.dtype))
        if pairs is not None:
            figures |= self.regression_step(pairs, self.config.regression.weight)
        if self.anchor is not None:
            figures |= self._anchor_step(sample.condition, self.anchor, draws)
        return figures

    def _anchor_step(self, condition: Condition, anchor: StepPlan, draws: Draws) -> Figures:
        """Accumulate the gradient of the student's first step towards the teacher's (DP-DMD)."""
        schedule = self.components.schedule
        eps = randn_like(torch.empty(condition.latent_shape(), device=condition.device), draws)
        x = initial_sample(schedule, self.plan, eps)
        teacher = guided(self.denoiser, self.config.distribution_matching.guidance)
        unconditional = self.components.unconditional(condition)
        with self.unet.role("teacher"), torch.no_grad():
            target = anchor_target(
                lambda x_t, t: teacher(x_t, t, condition, unconditional), x, schedule, anchor
            )
        t = self.plan.times(self.plan.told(0), x)
        with self.unet.role("student"):
            loss = regression_loss(self.denoiser(x, t, condition), target)
            (self.config.diversity_anchor.weight * loss).backward()
        return {"loss/anchor": loss.detach()}

    def regression_step(self, pairs: Pairs, weight: float = 1.0) -> Figures:
        """Accumulate the student's gradient towards the teacher's images (arXiv 2311.18828, 3.2).

        From the same noise, in one step: with the time told, and the coefficients, of inference.
        """
        x = initial_sample(self.components.schedule, self.plan, pairs.noise)
        t = self.plan.times(self.plan.told(0), x)
        with self.unet.role("student"):
            x0 = self.denoiser(x, t, pairs.condition)
            loss, gradient = self.regression(x0, pairs.latents)
            x0.backward((weight * gradient).to(x0.dtype))
        return {"loss/regression": loss}

    # -- the critic -------------------------------------------------------------------------------

    def critic_step(self, sample: StudentSample, batch: Batch, draws: Draws) -> Figures:
        """Accumulate the gradients of the critic (eq. 3) and of the discriminator (eq. 4)."""
        x, settings = sample.x0.detach(), self.config
        figures: Figures = {"sample/mean": x.mean(), "sample/deviation": x.std()}
        judged = None
        # One graph after the other: both at once need more memory.
        if settings.distribution_matching.enabled:
            with self.unet.role("critic"):
                loss, judged = self._denoising_loss(x, sample.condition, draws)
                figures["loss/critic"] = loss.detach()
                if judged is not None:
                    loss = loss + settings.gan.critic_weight * gan_fake_loss(judged)
                loss.backward()
        if settings.gan.enabled:
            assert batch.real is not None
            figures |= self.adversary.critic_step(sample.detached(), batch.real, draws, judged)
        return figures

    def _denoising_loss(
        self, x: Tensor, condition: Condition, draws: Draws
    ) -> tuple[Tensor, Tensor | None]:
        """How well the critic denoises the student's samples, in `critic.loss_space`.

        With `gan.shared_draw` also what the discriminator makes of them in this pass.
        """
        schedule, prediction = self.components.schedule, self.components.prediction
        t = random_timesteps(0, schedule.num_timesteps - 1, x, draws)
        eps = randn_like(x, draws)
        x_t, coefficients_t = add_noise(schedule, x, eps, t), coefficients(schedule, t, x)
        judged = None
        if self.config.gan.shared_draw:
            output, judged = self.adversary.output_and_logits(x_t, t, condition)
        else:
            output = self.unet(x_t, t, condition)
        if self.config.critic.loss_space == "velocity" and prediction != "flow":
            x0 = to_x0(prediction, output.float(), x_t, *coefficients_t)
            prediction, output = "v", from_x0("v", x0, x_t, *coefficients_t)
        weight = self.components.denoising_weight(coefficients_t[1])
        return denoising_loss(prediction, output, x, eps, *coefficients_t, weight), judged
