"""Flow as training steps: its deterministic sampler, and DMD where everything is exact."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dmd2_core import (
    Denoiser,
    SteppedSchedule,
    StepPlan,
    add_noise,
    coefficients,
    denoising_loss,
    distribution_matching_gradient,
    few_step_sample,
    initial_sample,
)

FLOW = SteppedSchedule.flow()
MEANS = torch.tensor([[1.2, 0.8], [-0.9, 1.0], [0.1, -1.3]], dtype=torch.float64)
DEVIATIONS = torch.tensor([0.3, 0.45, 0.6], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)


def no_noise(index: int, like: Tensor) -> Tensor:
    raise AssertionError("a deterministic sampler draws nothing")


def exact_flow(means: Tensor, deviations: Tensor, shares: Tensor) -> Denoiser[None]:
    """The ideal flow network E[eps - x0 | x_t] of a mixture of round Gaussians in the plane.

    Per component, with c = alpha^2 d^2 + sigma^2: E[x0] = m + alpha d^2 / c * (x_t - alpha m) and
    E[eps] = sigma / c * (x_t - alpha m); components weigh in by their density at x_t.
    """

    def network(x_t: Tensor, t: Tensor, condition: None) -> Tensor:
        alpha, sigma = (value[..., None] for value in coefficients(FLOW, t, x_t))  # (N, 1, 1)
        spread = alpha**2 * deviations[:, None] ** 2 + sigma**2
        offset = x_t[:, None] - alpha * means
        density = shares.log() - (offset**2 / (2 * spread)).sum(-1) - spread[..., 0].log()
        clean = means + alpha * deviations[:, None] ** 2 / spread * offset
        velocity = sigma / spread * offset - clean
        return (density.softmax(1)[..., None] * velocity).sum(1)

    return Denoiser(network, FLOW, "flow")


@pytest.mark.parametrize("timesteps", [(999, 749, 499, 249), (999, 899, 749, 499)])
def test_strength_0_is_diffusers_euler_for_flow(timesteps: tuple[int, ...]) -> None:
    """Evenly, and as a shift of 3 spaces four steps; it tells the network 1000 x flow time."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(2, 4, 8, 8, generator=generator)

    def network(x_t: Tensor, told: Tensor) -> Tensor:
        return torch.sin(3 * x_t) + told.view(-1, 1, 1, 1) / 700

    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=[(t + 1) / 1000 for t in timesteps])
    expected = eps
    for told in scheduler.timesteps:
        expected = scheduler.step(network(expected, told[None]), told, expected).prev_sample
    denoiser = Denoiser(lambda x_t, t, _: network(x_t, t + 1), FLOW, "flow")
    plan = StepPlan(timesteps=timesteps)
    start = initial_sample(FLOW, plan, eps)
    assert torch.equal(start, eps)
    ours = few_step_sample(
        lambda x, t: denoiser(x, t, None), start, FLOW, plan, noise=no_noise, strength=0.0
    )
    # Theirs steps in float32, ours converts to x0 and back in float64.
    torch.testing.assert_close(ours, expected, rtol=0, atol=2e-6)


def test_a_shift_of_3_spaces_four_steps_as_the_docs_say() -> None:
    times = [3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)]  # SD3's shift
    assert [round(1000 * t) - 1 for t in times] == [999, 899, 749, 499]
    assert FLOW.sigma(torch.tensor([999, 899, 749, 499])).tolist() == pytest.approx(times)


def test_the_exact_flow_carries_noise_to_the_distribution() -> None:
    """250 Euler steps of the network above: its own moments, as closed form and sampler agree."""
    generator = torch.Generator().manual_seed(1)
    eps = torch.randn(2000, 2, generator=generator, dtype=torch.float64)
    denoiser = exact_flow(MEANS, DEVIATIONS, SHARES)
    plan = StepPlan.evenly(250)
    x = few_step_sample(
        lambda x, t: denoiser(x, t, None), eps, FLOW, plan, noise=no_noise, strength=0.0
    )
    mean = (SHARES[:, None] * MEANS).sum(0)
    second = (SHARES * (2 * DEVIATIONS**2 + MEANS.square().sum(1))).sum()
    # Monte Carlo: five standard errors of 2000 samples, and a discretisation far below them.
    error = 5 / 2000**0.5
    assert ((x.mean(0) - mean).abs() < error * x.std(0)).all()
    squares = x.square().sum(1)
    assert (squares.mean() - second).abs() < error * squares.std()


def test_the_exact_flow_is_where_the_denoising_loss_has_its_minimum() -> None:
    generator = torch.Generator().manual_seed(2)
    which = torch.multinomial(SHARES, 20_000, replacement=True, generator=generator)
    unit = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    x0 = MEANS[which] + DEVIATIONS[which, None] * unit
    eps = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    t = torch.randint(1000, (20_000,), generator=generator)
    x_t, (alpha, sigma) = add_noise(FLOW, x0, eps, t), coefficients(FLOW, t, x0)
    output = exact_flow(MEANS, DEVIATIONS, SHARES).network(x_t, t, None).requires_grad_()
    loss = denoising_loss("flow", output, x0, eps, alpha, sigma)
    (slope,) = torch.autograd.grad(loss, output)
    # At a conditional mean the error is uncorrelated with anything of x_t, such as x_t and 1.
    for probe in (torch.ones_like(x_t), x_t, x_t * t[:, None] / 1000):
        products = (slope * probe).flatten()
        assert products.sum().abs() < 5 * products.std() * len(products) ** 0.5
    assert products.std() > 0


def test_descending_the_matching_gradient_finds_a_flow_teacher() -> None:
    """t ~ U{20..980}, an ideal critic, Adam, as test_gaussian_mixture.py does it for epsilon."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    true_scale, true_shift = 1.3, torch.tensor([1.0, -2.0], dtype=torch.float64)
    teacher = exact_flow(true_scale * MEANS + true_shift, true_scale * DEVIATIONS, SHARES)
    optimizer = torch.optim.Adam([scale, shift], lr=0.04, betas=(0.5, 0.9))
    for _ in range(250):
        which = torch.multinomial(SHARES, 128, replacement=True, generator=generator)
        unit = torch.randn(128, 2, generator=generator, dtype=torch.float64)
        x = scale * (MEANS[which] + DEVIATIONS[which, None] * unit) + shift
        t = torch.randint(20, 981, (1,), generator=generator).expand(128)
        eps = torch.randn(128, 2, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            x_t = add_noise(FLOW, x, eps, t)
            critic = exact_flow(scale * MEANS + shift, scale * DEVIATIONS, SHARES)
            direction = distribution_matching_gradient(
                x, teacher(x_t, t, None), critic(x_t, t, None)
            )
        optimizer.zero_grad()
        (x * direction).mean().backward()
        optimizer.step()
    # Starts 2 away in the shift and 0.6 in the scale; what is left is below one of Adam's steps.
    assert shift.detach().tolist() == pytest.approx(true_shift.tolist(), abs=0.03)
    assert scale.item() == pytest.approx(true_scale, abs=0.03)
