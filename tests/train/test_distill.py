"""The two steps of DMD2 against an independent computation with separate networks."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dmd2_core import (
    SeededNoise,
    add_noise,
    coefficients,
    few_step_sample,
    initial_sample,
    to_x0,
)
from train_lora.distill import Batch, Distiller
from train_lora.draws import Draws, randn_like, random_timesteps, sample_draws

from .tiny import demo_config, random_batch, random_distiller

STEP = 2  # of 4: two simulated steps before the student's own


@pytest.fixture
def distiller(tmp_path: Path) -> Distiller:
    return random_distiller(demo_config(tmp_path / "run", distribution_matching__guidance=3.0))


@pytest.fixture
def batch() -> Batch:
    return random_batch(2, torch.Generator().manual_seed(5))


def gradients(distiller: Distiller, role: str) -> list[Tensor | None]:
    return [parameter.grad for parameter in distiller.unet.parameters_of(role)]


def fresh_draws() -> Draws:
    return sample_draws(11, first=0, count=2)


def run_generator_step(distiller: Distiller, batch: Batch) -> Draws:
    noise = fresh_draws()
    sample = distiller.student_sample(batch, STEP, noise, with_graph=True)
    distiller.generator_step(sample, noise)
    return noise


def test_generator_gradient_equals_one_graph_through_separate_networks(
    distiller: Distiller, batch: Batch
) -> None:
    """The reference writes both losses out by hand and differentiates one graph at once."""
    reference = copy.deepcopy(distiller)
    run_generator_step(distiller, batch)

    draws, condition = fresh_draws(), batch.condition
    critic_copy = copy.deepcopy(reference.unet)
    schedule = reference.components.schedule

    def x0_of(unet: torch.nn.Module, x_t: Tensor, t: Tensor, told: object) -> Tensor:
        alpha, sigma = coefficients(schedule, t, x_t)
        return to_x0("epsilon", unet(x_t, t, told), x_t, alpha, sigma)

    x = randn_like(batch.real.latents, draws)
    reference.unet._activate("student")
    with torch.no_grad():
        for t_now, t_next in ((999, 749), (749, 499)):
            x0 = x0_of(reference.unet, x, torch.full((2,), t_now), condition)
            x = add_noise(schedule, x0, randn_like(x, draws), torch.full((2,), t_next))
    sample = x0_of(reference.unet, x, torch.full((2,), 499), condition)

    t = random_timesteps(20, 980, sample, draws)
    x_t = add_noise(schedule, sample.detach(), randn_like(sample, draws), t)
    with torch.no_grad():
        critic_copy._activate("teacher")
        with_prompt = x0_of(critic_copy, x_t, t, condition)
        without = x0_of(critic_copy, x_t, t, condition.zeros_like())
        real = without + 3.0 * (with_prompt - without)
        critic_copy._activate("critic")
        fake = x0_of(critic_copy, x_t, t, condition)
    weight = (sample.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    matching = (sample * (fake - real) / weight).sum() / sample.numel()
    t = random_timesteps(0, 999, sample, draws)
    x_t = add_noise(schedule, sample, randn_like(sample, draws), t)
    logits = reference.head(*critic_copy.features(x_t, t, condition))
    gan = torch.nn.functional.softplus(-logits).mean()
    expected = torch.autograd.grad(
        matching + reference.config.gan.generator_weight * gan,
        reference.unet.parameters_of("student"),
    )
    for got, wanted in zip(gradients(distiller, "student"), expected, strict=True):
        # The same float32 kernels; guidance in a batch of 2B and the order of sums differ.
        torch.testing.assert_close(got, wanted, rtol=2e-3, atol=2e-6)


def test_generator_step_leaves_critic_and_head_without_gradient(
    distiller: Distiller, batch: Batch
) -> None:
    run_generator_step(distiller, batch)
    assert all(gradient is None for gradient in gradients(distiller, "critic"))
    assert all(parameter.grad is None for parameter in distiller.head.parameters())
    assert all(gradient.abs().max() > 0 for gradient in gradients(distiller, "student"))


def test_critic_step_leaves_the_student_without_gradient(
    distiller: Distiller, batch: Batch
) -> None:
    noise = fresh_draws()
    sample = distiller.student_sample(batch, STEP, noise, with_graph=False)
    figures = distiller.critic_step(sample, batch, noise)
    assert all(gradient is None for gradient in gradients(distiller, "student"))
    assert all(gradient.abs().max() > 0 for gradient in gradients(distiller, "critic"))
    assert all(parameter.grad is not None for parameter in distiller.head.parameters())
    # An untrained head says "even odds": each of the two terms is near log 2.
    assert figures["loss/gan_critic"].item() == pytest.approx(1.386, abs=0.3)


def test_backward_simulation_stops_where_inference_passes_through(
    distiller: Distiller, batch: Batch
) -> None:
    """The student's training sample is inference's intermediate x0_hat for the same noise."""
    draws = fresh_draws()
    sample = distiller.student_sample(batch, STEP, draws, with_graph=False)
    schedule, plan = distiller.components.schedule, distiller.plan
    replay = fresh_draws()
    eps = randn_like(batch.real.latents, replay)
    seen = {}
    with torch.no_grad(), distiller.unet.role("student"):
        few_step_sample(
            lambda x, t: distiller.denoiser(x, t, batch.condition),
            initial_sample(schedule, plan, eps),
            schedule,
            plan,
            noise=lambda step, like: (
                randn_like(like, replay) if step <= STEP else SeededNoise(0)(step, like)
            ),
            callback=lambda step, x_t, x0: seen.update({step: x0}),
        )
    assert torch.equal(sample.x0, seen[STEP])


def test_without_backward_simulation_the_input_is_a_noised_real_latent(
    tmp_path: Path, batch: Batch
) -> None:
    config = demo_config(tmp_path / "run", backward_simulation__enabled="false")
    distiller = random_distiller(config)
    x_t, condition = distiller._student_input(batch, STEP, fresh_draws())
    expected = add_noise(
        distiller.components.schedule,
        batch.real.latents,
        randn_like(batch.real.latents, fresh_draws()),
        torch.full((2,), 499),
    )
    assert torch.equal(x_t, expected)
    assert condition is batch.real.condition


@pytest.mark.parametrize(
    ("section", "absent"),
    [("gan", "loss/gan_critic"), ("distribution_matching", "loss/critic")],
)
def test_a_loss_that_is_off_is_not_computed(
    tmp_path: Path, batch: Batch, section: str, absent: str
) -> None:
    # Keys that the ablated loss leaves without effect may not be set, so start from the switch.
    config = demo_config(tmp_path / "run")
    switched = copy.copy(getattr(config, section))
    object.__setattr__(switched, "enabled", False)
    changed = copy.copy(config)
    object.__setattr__(changed, section, switched)
    distiller = random_distiller(changed)
    noise = fresh_draws()
    sample = distiller.student_sample(batch, 0, noise, with_graph=True)
    figures = distiller.generator_step(sample, noise)
    figures |= distiller.critic_step(sample.detached(), batch, noise)
    assert absent not in figures
    assert len([name for name in figures if name.startswith("loss/")]) == 2


def test_in_velocity_space_the_critics_error_counts_more_at_high_noise(
    tmp_path: Path, batch: Batch
) -> None:
    """v = alpha * eps - sigma * x0, so an epsilon network's error counts 1 / alpha^2 times."""
    settings = {"gan__enabled": "false", "critic__loss_space": "velocity"}
    distiller = random_distiller(demo_config(tmp_path / "run", **settings))
    sample = distiller.student_sample(batch, STEP, fresh_draws(), with_graph=False)
    found = distiller.critic_step(sample, batch, fresh_draws())["loss/critic"]

    draws, schedule = fresh_draws(), distiller.components.schedule
    t = random_timesteps(0, 999, sample.x0, draws)
    eps = randn_like(sample.x0, draws)
    alpha, _ = coefficients(schedule, t, eps)
    with torch.no_grad(), distiller.unet.role("critic"):
        x_t = add_noise(schedule, sample.x0, eps, t)
        error = (distiller.unet(x_t, t, sample.condition) - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(found, (error / alpha.flatten() ** 2).mean().float())
