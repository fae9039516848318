"""The weights of f-divergences: from f itself, in an exact gradient, and in a fit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from dmd2_core import Divergence, divergence_weight
from dmd2_core.divergence import LARGEST_RATIO

F_OF: dict[str, Callable[[Tensor], Tensor]] = {
    "reverse-kl": lambda r: -r.log(),
    "softened-reverse-kl": lambda r: (r + 1) * (1 / 2 + 1 / (2 * r)).log(),
    "jensen-shannon": lambda r: r * r.log() - (r + 1) * ((r + 1) / 2).log(),
    "forward-kl": lambda r: r * r.log(),
}

AXIS = torch.linspace(-15, 15, 4001, dtype=torch.float64)
CELL = 30 / 4000
TEACHER = torch.distributions.MixtureSameFamily(
    torch.distributions.Categorical(torch.tensor([0.5, 0.5], dtype=torch.float64)),
    torch.distributions.Normal(
        torch.tensor([-1.5, 1.5], dtype=torch.float64), torch.tensor([0.6, 0.6]).double()
    ),
)


@pytest.mark.parametrize("divergence", F_OF)
def test_the_weight_is_the_second_derivative_of_f_times_the_ratio_squared(divergence) -> None:
    r = torch.tensor([0.1, 0.3, 1.0, 2.5, 10.0], dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(F_OF[divergence](r).sum(), r, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), r)
    found = divergence_weight(divergence, r.detach().log())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), second * r.detach() ** 2, rtol=1e-6, atol=0)


def test_ratios_beyond_the_largest_count_as_that() -> None:
    logits = torch.tensor([-50.0, 50.0])
    found = divergence_weight("forward-kl", logits)
    torch.testing.assert_close(found, torch.tensor([1 / LARGEST_RATIO, LARGEST_RATIO]))


def test_every_divergence_is_tested() -> None:
    assert get_args(Divergence) == tuple(F_OF)


def test_an_unknown_divergence_is_refused() -> None:
    with pytest.raises(ValueError, match="divergence is 'kl': use one of reverse-kl, softened"):
        divergence_weight("kl", torch.zeros(1))  # type: ignore[arg-type]


def student(mean: Tensor, log_deviation: Tensor) -> torch.distributions.Normal:
    return torch.distributions.Normal(mean, log_deviation.exp())


def score(density: torch.distributions.Distribution) -> Tensor:
    x = AXIS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    return gradient


TEACHER_LOG, TEACHER_SCORE = TEACHER.log_prob(AXIS), score(TEACHER)


def weighted_gradient(divergence: str, mean: Tensor, log_deviation: Tensor) -> Tensor:
    """E_q[h(r) (score_q - score_p) dx] by (mean, log deviation), for x = mean + deviation * z."""
    log_q = student(mean, log_deviation).log_prob(AXIS)
    weight = divergence_weight(divergence, TEACHER_LOG - log_q).double()
    own_score = -(AXIS - mean) / (2 * log_deviation).exp()
    pull = log_q.exp() * weight * (own_score - TEACHER_SCORE) * CELL
    return torch.stack([pull.sum(), (pull * (AXIS - mean)).sum()])


@pytest.mark.parametrize("divergence", F_OF)
def test_the_weighted_gradient_is_that_of_the_divergence(divergence, monkeypatch) -> None:
    """Against autograd through the integral of q f(p / q)."""
    monkeypatch.setattr("dmd2_core.divergence.LARGEST_RATIO", 1e30)
    at = torch.tensor([0.4, math.log(1.3)], dtype=torch.float64, requires_grad=True)
    q = student(at[0], at[1])
    log_q = q.log_prob(AXIS)
    ratio = (TEACHER_LOG - log_q).exp()
    (exact,) = torch.autograd.grad((log_q.exp() * F_OF[divergence](ratio)).sum() * CELL, at)
    found = weighted_gradient(divergence, *at.detach())
    # The weights are float32.
    torch.testing.assert_close(found, exact, rtol=1e-5, atol=1e-6)


def test_the_fit_covers_more_in_the_order_of_the_divergences() -> None:
    """One Gaussian fitted to two modes, from one of them: the reverse KL stays there, with the
    mode's own width or little more; the forward KL takes the mixture's mean and, but for the
    clamped tails, its deviation, sqrt(0.6^2 + 1.5^2) = 1.62."""
    fits = {}
    for divergence in F_OF:
        at = torch.tensor([1.3, math.log(0.6)], dtype=torch.float64)
        for _ in range(300):
            at -= 0.2 * weighted_gradient(divergence, *at)
        fits[divergence] = (abs(float(at[0])), float(at[1].exp()))
    assert fits["reverse-kl"][0] > 1.2
    assert fits["reverse-kl"][1] < 0.8
    assert fits["forward-kl"][0] < 0.05
    assert fits["forward-kl"][1] == pytest.approx(math.hypot(0.6, 1.5), rel=0.08)
    order = ("softened-reverse-kl", "reverse-kl", "jensen-shannon", "forward-kl")
    deviations = [fits[name][1] for name in order]
    assert deviations == sorted(deviations), fits
