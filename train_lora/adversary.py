"""The discriminator (DMD2, sec. 4.3): what it sees, how it learns, and what the student learns.

It is a head on feature maps of the critic or of the teacher (`gan.features`, `gan.layers`), which
see real images and the student's samples with noise of random levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dmd2_core import (
    Divergence,
    LayerHeads,
    MiddleBlockHead,
    SteppedSchedule,
    VPSchedule,
    add_noise,
    approximate_r1_loss,
    divergence_weight,
    gan_critic_loss,
    gan_generator_loss,
    sample_gradient,
)

from .config_losses import GanConfig
from .distributed import several, total
from .draws import Draws, randn_like, random_timesteps
from .models.class_condition import AnyCondition as Condition
from .models.passes import MIDDLE, LayerShape
from .models.roles import SharedUNet

if TYPE_CHECKING:
    from .distill import Figures, RealImages, StudentSample

_KEPT = 0.9
"""Of the mean weight of the updates before."""


def chosen_layers(settings: GanConfig, offered: dict[str, LayerShape]) -> tuple[str, ...]:
    """The names of the feature maps that the head sees; ValueError for one that is not there."""
    if settings.layers == ("all",):
        return tuple(offered)
    for name in settings.layers:
        if name not in offered:
            raise ValueError(
                f'gan.layers names "{name}", which this model does not have; choose from '
                f'{", ".join(offered)}, or write "all".'
            )
    return settings.layers


def build_head(
    settings: GanConfig,
    unet: SharedUNet,
    side: int,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """The paper's head on the middle block, or a head for each of several layers.

    Called with the maps of `chosen_layers`; `side`: latent cells along each side of an image at
    the base resolution; `generator` as for `MiddleBlockHead`.
    """
    names = chosen_layers(settings, unet.layers)
    shapes = {
        name: (unet.layers[name].channels, side // unet.layers[name].downscale) for name in names
    }
    if names == (MIDDLE,):
        return MiddleBlockHead(*shapes[MIDDLE], generator=generator)
    return LayerHeads(shapes, generator=generator)


@dataclass(kw_only=True, slots=True)
class Adversary:
    """The head, on the network whose features it reads."""

    unet: SharedUNet
    head: nn.Module
    schedule: VPSchedule | SteppedSchedule
    settings: GanConfig
    divergence: Divergence
    layers: tuple[str, ...] = field(init=False)
    mean_weight: float = field(init=False)
    """Running mean of the divergence's weights over the student's updates; saved."""
    _weights: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        enabled = self.settings.enabled
        self.layers = chosen_layers(self.settings, self.unet.layers) if enabled else ()
        self.mean_weight = float(divergence_weight(self.divergence, torch.zeros(1)))

    # -- the student ------------------------------------------------------------------------------

    def generator_gradient(
        self, x: Tensor, condition: Condition, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """The GAN loss of the samples `x` (B, 4, H/8, W/8) and its gradient there."""
        with self.unet.role(self.settings.features):
            return sample_gradient(
                lambda s: gan_generator_loss(self.logits(s, condition, draws)), x
            )

    @torch.no_grad()
    def weighted(self, gradient: Tensor, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """The distribution matching gradient of `distribution_matching.divergence`.

        `gradient`: that of the reverse KL, (B, 4, H/8, W/8), found at `x_t` and `t`, where the
        logits estimate the ratio of real images to the student's. The weights' mean over the
        batch is brought to 1 as the paper does, but with a running mean over earlier updates: then
        a sample's weight does not depend on how the batch is split, and a batch may be one image.
        """
        if self.divergence == "reverse-kl":
            return gradient
        with self.unet.role(self.settings.features):
            weight = divergence_weight(self.divergence, self.logits_at(x_t, t, condition))
        self._weights.append(weight.mean())
        return gradient * (weight / self.mean_weight).view(-1, 1, 1, 1)

    def settle(self) -> Figures:
        """After an update of the student: note the mean weight, over micro-batches and processes.

        All processes call it; what is not finite is left out.
        """
        if not self._weights:
            return {}
        found = torch.stack(self._weights).mean()
        self._weights.clear()
        shared = total(torch.stack([found, torch.ones_like(found)])) if several() else None
        mean = float(found) if shared is None else float(shared[0] / shared[1])
        if math.isfinite(mean):
            self.mean_weight = _KEPT * self.mean_weight + (1 - _KEPT) * mean
        return {"divergence/weight": found}

    # -- the discriminator ------------------------------------------------------------------------

    def critic_step(
        self, sample: StudentSample, real: RealImages, draws: Draws, judged: Tensor | None
    ) -> Figures:
        """Accumulate the discriminator's gradient (eq. 4), weighted as beside the denoising loss.

        `judged`: the samples' logits where the denoising pass has given them, and their half of
        the loss has had its gradient (`gan.shared_draw`).
        """
        settings, rows = self.settings, len(draws)
        x, condition = real.latents, real.condition
        if judged is None:
            x = torch.cat([x, sample.x0])
            condition = condition.cat([condition, sample.condition])
        each = [*draws] * (len(x) // rows)
        t = random_timesteps(0, self.schedule.num_timesteps - 1, x, each)
        eps = randn_like(x, each)
        x_t = add_noise(self.schedule, x, eps, t)
        if settings.r1_weight:
            moved = real.latents + settings.r1_noise * randn_like(real.latents, draws)
            moved_t = add_noise(self.schedule, moved, eps[:rows], t[:rows])
            x_t, t = torch.cat([x_t, moved_t]), torch.cat([t, t[:rows]])
            condition = condition.cat([condition, real.condition])
        with self.unet.role(settings.features):
            parts = self.logits_at(x_t, t, condition).split(rows)
            on_real, on_fake = parts[0], parts[1] if judged is None else judged.detach()
            loss = gan_critic_loss(on_real, on_fake)
            figures = {
                "real/mean": real.latents.mean(),
                "real/deviation": real.latents.std(),
                "loss/gan_critic": loss.detach(),
                "discriminator/real_accuracy": (on_real > 0).float().mean(),
                "discriminator/fake_accuracy": (on_fake < 0).float().mean(),
            }
            if settings.r1_weight:
                penalty = approximate_r1_loss(on_real, parts[-1])
                figures["loss/r1"] = penalty.detach()
                loss = loss + settings.r1_weight * penalty
            (settings.critic_weight * loss).backward()
        return figures

    # -- logits -----------------------------------------------------------------------------------

    def logits(self, x: Tensor, condition: Condition, draws: Draws) -> Tensor:
        """Of `x`, noised at random times: (B,). In the role whose features are read."""
        t = random_timesteps(0, self.schedule.num_timesteps - 1, x, draws)
        x_t = add_noise(self.schedule, x, randn_like(x, draws), t)
        return self.logits_at(x_t, t, condition)

    def logits_at(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Of noised images: (B,), large for real ones. In the role whose features are read."""
        logits: Tensor = self.head(*self.unet.features(x_t, t, condition, self.layers))
        return logits

    def output_and_logits(
        self, x_t: Tensor, t: Tensor, condition: Condition
    ) -> tuple[Tensor, Tensor]:
        """The active role's output, and the logits on its features, by one pass."""
        output, maps = self.unet.with_features(x_t, t, condition, self.layers)
        return output, self.head(*maps)
