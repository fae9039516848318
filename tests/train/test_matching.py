"""The guidance term of the matching gradient: joint with the comparison, weighted, and apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dmd2_core import add_noise, distribution_matching_gradient
from train_lora.distill import Distiller, StudentSample
from train_lora.draws import Draws, randn_like, random_timesteps, sample_draws
from train_lora.matching import _against_critic, _guidance_term, matching_gradient

from .tiny import demo_config, random_condition, random_distiller, small_trainer


def fresh_draws() -> Draws:
    return sample_draws(11, first=0, count=2)


def distiller_with(directory: Path, **settings: Any) -> Distiller:
    keyed = {f"distribution_matching__{key}": value for key, value in settings.items()}
    return random_distiller(demo_config(directory, **keyed))


@pytest.fixture
def sample() -> StudentSample:
    generator = torch.Generator().manual_seed(5)
    condition = random_condition(2, generator)
    x0 = torch.randn(2, 4, 16, 16, generator=generator)
    return StudentSample(x0=x0, condition=condition, timestep=499)


def test_shared_and_weighted_is_the_joint_gradient_of_that_guidance_bit_for_bit(
    tmp_path: Path, sample: StudentSample
) -> None:
    joint = distiller_with(tmp_path, guidance=2.0)
    weighted = distiller_with(tmp_path, guidance=3.0, guidance_weight=0.5)
    other = distiller_with(tmp_path, guidance=3.0)
    found = [matching_gradient(d, sample, fresh_draws()) for d in (joint, weighted, other)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_the_terms_at_the_same_noise_add_up_to_the_joint_gradient(
    tmp_path: Path, sample: StudentSample
) -> None:
    """Once the normalisation, which is each term's own, is taken out."""
    distiller = distiller_with(tmp_path, guidance=3.0)
    x0_cond, x0_guided = predictions(distiller, sample, fresh_draws(), 20, 980)
    with torch.no_grad():
        joint, plain = (
            _against_critic(distiller, sample, guidance, fresh_draws()) for guidance in (3.0, 1.0)
        )
        apart = _guidance_term(distiller, sample, 20, 980, fresh_draws())
    to_cond, to_guided = (
        (sample.x0 - x0).abs().mean((1, 2, 3), keepdim=True) for x0 in (x0_cond, x0_guided)
    )
    # Sums in float32 of differences that nearly cancel.
    torch.testing.assert_close(
        plain * to_cond + apart * to_guided, joint * to_guided, rtol=1e-3, atol=1e-5
    )


def predictions(
    distiller: Distiller, sample: StudentSample, draws: Draws, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """The teacher's x0 without and with guidance 3, one pass for each branch."""
    t = random_timesteps(low, high, sample.x0, draws)
    x_t = add_noise(distiller.components.schedule, sample.x0, randn_like(sample.x0, draws), t)
    with torch.no_grad(), distiller.unet.role("teacher"):
        cond = distiller.denoiser(x_t, t, sample.condition)
        uncond = distiller.denoiser(x_t, t, sample.condition.zeros_like())
    return cond, uncond + 3.0 * (cond - uncond)


@pytest.mark.parametrize(("where", "low"), [("apart", 20), ("above", 499)])
def test_apart_each_term_has_times_and_noise_of_its_own(
    tmp_path: Path, sample: StudentSample, where: str, low: int
) -> None:
    distiller = distiller_with(tmp_path, guidance=3.0, guidance_timesteps=where)
    found = matching_gradient(distiller, sample, fresh_draws())

    draws = fresh_draws()
    with torch.no_grad():
        wanted = _against_critic(distiller, sample, 1.0, draws)
    cond, guided = predictions(distiller, sample, draws, low, 980)
    wanted = wanted + distribution_matching_gradient(sample.x0, guided, cond)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("where", "step", "bounds"),
    [("above", 749, (749, 980)), ("above", 999, (980, 980)), ("apart", 749, (20, 980))],
)
def test_above_is_between_the_students_step_and_the_largest_timestep(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, step: int, bounds: tuple[int, int]
) -> None:
    distiller = distiller_with(tmp_path, guidance_timesteps=where)
    asked = []
    told = random_timesteps

    def noted(low: int, high: int, like: Tensor, draws: Draws) -> Tensor:
        asked.append((low, high))
        return told(low, high, like, draws)

    monkeypatch.setattr("train_lora.matching.random_timesteps", noted)
    condition = random_condition(2, torch.Generator().manual_seed(5))
    x0 = torch.zeros(2, 4, 16, 16)
    sample = StudentSample(x0=x0, condition=condition, timestep=step)
    matching_gradient(distiller, sample, fresh_draws())
    assert asked == [(20, 980), bounds]


@pytest.mark.parametrize("key", ["guidance_weight", "guidance_timesteps"])
def test_without_guidance_its_term_has_no_settings(tmp_path: Path, key: str) -> None:
    value = {"guidance_weight": 0.5, "guidance_timesteps": "apart"}[key]
    message = rf"{key} is .* but has no effect, because distribution_matching.guidance is 1.0"
    with pytest.raises(ValueError, match=message):
        distiller_with(tmp_path, guidance=1, **{key: value})


def test_the_critics_betas_are_its_own_or_the_trainings(tmp_path: Path) -> None:
    small = {"gan__enabled": "false", "training__betas": "[0.8, 0.9]"}
    found = {}
    for betas in ("none", "[0, 0.99]"):
        trainer = small_trainer(tmp_path, critic__betas=betas, **small)
        assert trainer.student.optimizer.param_groups[0]["betas"] == (0.8, 0.9)
        found[betas] = [group["betas"] for group in trainer.critic.optimizer.param_groups]
    assert found == {"none": [(0.8, 0.9)] * 2, "[0, 0.99]": [(0.0, 0.99)] * 2}
