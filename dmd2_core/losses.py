"""The losses of DMD2 (arXiv 2405.14867) as pure functions.

Everything is computed, and returned, in float32 (float64 inputs stay float64), whatever the
autocast state of the networks. No function here draws random numbers or calls a network.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .prediction import Prediction
from .prediction import target as prediction_target


def _wide(x: Tensor) -> Tensor:
    """`x` in float32, or float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def distribution_matching_gradient(x: Tensor, x0_real: Tensor, x0_fake: Tensor) -> Tensor:
    """The direction that increases KL(student || teacher) at the sample `x` (DMD2, eq. 2).

    `x`: the student's sample; `x0_real`, `x0_fake`: what the (guided) teacher and the critic make
    of the same noised `x`; all (B, C, H, W). ((x - x0_real) - (x - x0_fake)) divided by the
    sample's mean over CHW of |x - x0_real| (arXiv 2311.18828, eq. 8). A sample for which that is
    not finite, such as 0 / 0, contributes zeros. No autograd.
    """
    x, x0_real, x0_fake = _wide(x), _wide(x0_real), _wide(x0_fake)
    scale = (x - x0_real).abs().flatten(1).mean(dim=1).view(-1, *(1,) * (x.ndim - 1))
    return torch.nan_to_num((x0_fake - x0_real) / scale, nan=0.0, posinf=0.0, neginf=0.0)


def distribution_matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """0.5 * mse(x, stopgrad(x - gradient)), a scalar; its derivative by `x`: gradient / numel."""
    x = _wide(x)
    return 0.5 * F.mse_loss(x, (x - gradient).detach())


def denoising_loss(
    prediction: Prediction,
    output: Tensor,
    x0: Tensor,
    eps: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Mean squared error of a network `output` against its target, in the network's own space.

    `output`, `x0`, `eps`: (B, C, H, W); `alpha`, `sigma`: from `schedule.coefficients`;
    `weight`: (B,) factors per sample, None for 1 (the paper's choice).
    """
    wanted = prediction_target(prediction, _wide(x0), eps, alpha, sigma)
    error = (_wide(output) - wanted).square().flatten(1).mean(dim=1)
    return error.mean() if weight is None else (weight * error).mean()


def edm_loss_weight(sigma: Tensor, sigma_data: float = 0.5) -> Tensor:
    """(sigma^2 + sigma_data^2) / (sigma * sigma_data)^2, in `sigma`'s shape and dtype.

    EDM's weight of the squared error in x0 (arXiv 2206.00364, table 1): 1 / c_out^2, so the raw
    network's error counts alike at every noise level. Its denoising loss, and that of the critic
    beside an EDM teacher, is `denoising_loss("sample", ..., weight=edm_loss_weight(sigma))`.
    """
    return sigma**-2 + sigma_data**-2


def gan_real_loss(logits: Tensor) -> Tensor:
    """mean softplus(-logits): small when the head takes these images, (B,), for real."""
    return F.softplus(-_wide(logits)).mean()


def gan_fake_loss(logits: Tensor) -> Tensor:
    """mean softplus(logits): small when the head takes these images, (B,), for the student's."""
    return F.softplus(_wide(logits)).mean()


def gan_generator_loss(fake_logits: Tensor) -> Tensor:
    """mean softplus(-fake): small when the head takes the student's samples, (B,), for real."""
    return gan_real_loss(fake_logits)


def gan_critic_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """mean softplus(fake) + mean softplus(-real): small when the head tells (B,) from (B',)."""
    return gan_fake_loss(fake_logits) + gan_real_loss(real_logits)


def approximate_r1_loss(real_logits: Tensor, moved_logits: Tensor) -> Tensor:
    """Mean squared difference of the logits of real images and of the same, slightly noised: (B,).

    Approximates the R1 penalty without a second derivative (arXiv 2501.08316, sec. 3): with noise
    of deviation s, small, it is near s^2 times the squared norm of the logit's gradient.
    """
    return F.mse_loss(_wide(moved_logits), _wide(real_logits))


def regression_loss(x: Tensor, target: Tensor) -> Tensor:
    """Mean squared error between the student's samples and the teacher's, (B, C, H, W)."""
    return F.mse_loss(_wide(x), _wide(target))


def sample_gradient(loss_fn: Callable[[Tensor], Tensor], sample: Tensor) -> tuple[Tensor, Tensor]:
    """The value of `loss_fn` at the detached `sample` and its gradient there: (), (B, C, H, W).

    The objective speaks in such gradients: each is taken while ITS network is active, their sum
    goes through the student with one `sample.backward(total)`. Parameters gather no `.grad` here.
    """
    with torch.enable_grad():
        leaf = sample.detach().requires_grad_(True)
        value = loss_fn(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient
