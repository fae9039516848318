"""The diversity anchor: its times, its target in closed form, its gradient, and that it teaches."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dmd2_core import FlowSchedule, StepPlan, VPSchedule, coefficients, few_step_sample
from train_lora.anchor import anchor_plan, anchor_target
from train_lora.config_anchor import DiversityAnchorConfig
from train_lora.data.demo_data import demo_captions
from train_lora.data.training_data import encode_captions, load_training_data
from train_lora.demo import scenes
from train_lora.demo.classifier import load_classifier
from train_lora.demo.teacher import load_teacher
from train_lora.distill import Batch, Distiller
from train_lora.draws import randn_like, sample_draws
from train_lora.sampling import decode_latents, sample_latents
from train_lora.trainer import build_trainer

from .tiny import demo_config, random_batch, random_distiller, small_trainer

FOUR = StepPlan.evenly(4)
SDXL = VPSchedule.sdxl()
ANCHORED = {"diversity_anchor__weight": 0.5, "diversity_anchor__teacher_steps": 3}


def settings(**values: Any) -> DiversityAnchorConfig:
    return DiversityAnchorConfig(weight=0.05, **values)


# -- the teacher's way -----------------------------------------------------------------------------


def test_the_teacher_goes_to_the_students_second_timestep_in_even_steps() -> None:
    six = anchor_plan(settings(), FOUR)
    assert six.timesteps == (999, 957, 915, 874, 832, 790, 749)
    assert anchor_plan(settings(teacher_steps=1), FOUR).timesteps == (999, 749)
    assert anchor_plan(settings(teacher_steps=2, timestep=499), FOUR).timesteps == (999, 749, 499)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timestep": 900}, r"timestep is 900, but the student's first timestep is 900.*below 900"),
        ({"timestep": 897}, r"teacher_steps is 6, but .* 900 to 897 there are 3; .* at most 3"),
    ],
)
def test_there_must_be_room_for_the_teachers_steps(values: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anchor_plan(settings(**values), StepPlan(timesteps=(900, 500)))


def teacher(x: Tensor, t: Tensor) -> Tensor:
    """A nonlinear stand-in that depends on the sample and on the time."""
    return torch.tanh(0.7 * x) + torch.sin(t.view(-1, 1, 1, 1).to(x.dtype) / 100)


def randn(seed: int) -> Tensor:
    shape, generator = (2, 4, 8, 8), torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("schedule", [SDXL, SDXL.zero_terminal_snr()], ids=["SDXL", "zero SNR"])
def test_one_deterministic_step_with_the_target_lands_where_the_teacher_does(
    schedule: VPSchedule,
) -> None:
    """The teacher's three DDIM steps are written out; float64, so rounding alone differs."""
    x = z = randn(1)
    plan = anchor_plan(settings(teacher_steps=3, timestep=699), FOUR)
    for now, following in ((999, 899), (899, 799), (799, 699)):
        alpha, sigma = coefficients(schedule, torch.full((2,), now), z)
        alpha_next, sigma_next = coefficients(schedule, torch.full((2,), following), z)
        x0 = teacher(z, torch.full((2,), now))
        z = alpha_next * x0 + sigma_next * (z - alpha * x0) / sigma

    target = anchor_target(teacher, x, schedule, plan)

    lands = few_step_sample(
        lambda *_: target, x, schedule, StepPlan(timesteps=(999, 699)), strength=0.0, stop=1,
        noise=lambda *_: pytest.fail("deterministic"),
    )  # fmt: skip
    torch.testing.assert_close(lands, z, rtol=1e-12, atol=1e-12)
    assert (target - teacher(x, torch.full((2,), 999))).abs().mean() > 0.1


def test_of_one_teacher_step_the_target_is_the_teachers_image() -> None:
    plan = anchor_plan(settings(teacher_steps=1), FOUR)
    found = anchor_target(teacher, randn(1), SDXL, plan)
    torch.testing.assert_close(found, teacher(randn(1), torch.full((2,), 999)))


def test_on_a_flow_the_target_is_the_mean_velocitys() -> None:
    """DP-DMD's own case: from 1 to t the mean velocity is (eps - z) / (1 - t), and x0 = eps - v."""
    plan = StepPlan(timesteps=(1.0, 0.9, 0.75))
    eps = randn(1)
    target = anchor_target(teacher, eps, FlowSchedule(), plan)
    half = 0.9 * eps + 0.1 * teacher(eps, torch.ones(2))
    velocity = (half - teacher(half, torch.full((2,), 0.9, dtype=torch.float64))) / 0.9
    z = half - 0.15 * velocity
    torch.testing.assert_close(target, eps - (eps - z) / 0.25)


# -- in the student's update -----------------------------------------------------------------------


@pytest.fixture
def batch() -> Batch:
    return random_batch(2, torch.Generator().manual_seed(5))


def student_gradient(distiller: Distiller, batch: Batch) -> Tensor:
    draws = sample_draws(11, first=0, count=2)
    sample = distiller.student_sample(batch, 2, draws, with_graph=True)
    distiller.generator_step(sample, draws)
    found = [p.grad.flatten() for p in distiller.unet.parameters_of("student")]
    return torch.cat(found)


def test_the_first_steps_squared_error_is_added_to_the_gradient(
    tmp_path: Path, batch: Batch
) -> None:
    anchored = random_distiller(demo_config(tmp_path, **ANCHORED, gan__enabled="false"))
    plain = random_distiller(demo_config(tmp_path, gan__enabled="false"))
    added = student_gradient(anchored, batch) - student_gradient(plain, batch)

    draws = sample_draws(11, first=0, count=2)
    reference = copy.deepcopy(plain)
    sample = reference.student_sample(batch, 2, draws, with_graph=True)
    reference.generator_step(sample, draws)  # what else is drawn comes before
    eps = randn_like(batch.real.latents, draws)
    unet, condition = reference.unet, batch.condition
    for parameter in unet.parameters_of("student"):
        parameter.grad = None

    def guided_teacher(x: Tensor, t: Tensor) -> Tensor:
        with_prompt = reference.denoiser(x, t, condition)
        without = reference.denoiser(x, t, condition.zeros_like())
        return without + 2.0 * (with_prompt - without)

    with torch.no_grad(), unet.role("teacher"):
        plan = StepPlan(timesteps=(999, 915, 832, 749))
        target = anchor_target(guided_teacher, eps, SDXL, plan)
    unet._activate("student")
    first = reference.denoiser(eps, torch.full((2,), 999), condition)
    (0.5 * (first - target).square().mean()).backward()
    wanted = torch.cat([p.grad.flatten() for p in unet.parameters_of("student")])
    # A difference of float32 gradients; guidance in a batch of 2B.
    torch.testing.assert_close(added, wanted, rtol=1e-3, atol=1e-5 * wanted.abs().max().item())
    assert all(p.grad is None for p in anchored.unet.parameters_of("critic"))


def test_the_other_losses_leave_the_first_step_to_the_anchor(tmp_path: Path) -> None:
    anchored = small_trainer(tmp_path, **ANCHORED)
    plain = small_trainer(tmp_path)
    assert {anchored.step_index(i) for i in range(60)} == {1, 2, 3}
    assert {plain.step_index(i) for i in range(60)} == {0, 1, 2, 3}


def test_a_training_with_anchor_and_guidance_apart_nears_the_teacher_and_real_scenes(
    tmp_path: Path,
) -> None:
    """Eight updates on the embedded teacher: the first step's error on other noise falls, and so
    does the distance of 4-step pictures' mean features from those of real scenes of the same
    prompts, both against the untrained student's."""
    captions = tmp_path / "prompts.txt"
    captions.write_text("\n".join(demo_captions(32)))
    config = demo_config(
        tmp_path / "run",
        **{"data__prompts": captions, "gan__enabled": "false", "validation__every": 0},
        **{"training__batch_size": 4, "critic__updates_per_generator": 1},
        **{"training__learning_rate_decay": 0, "student__learning_rate": 1e-3},
        **{"diversity_anchor__weight": 0.5, "diversity_anchor__teacher_steps": 2},
        distribution_matching__guidance_timesteps="above",
    )
    model, classifier = load_teacher(), load_classifier()
    data = load_training_data(config, model)
    trainer = build_trainer(config, model, data, Accelerator(cpu=True))
    distiller = trainer.distiller
    shown = scenes.random_scenes(16, torch.Generator().manual_seed(3))
    condition = encode_captions(model, [scene.caption for scene in shown], 128)
    real = scenes.draw(shown * 4, torch.Generator().manual_seed(4))

    def error() -> float:
        draws = sample_draws(5, first=0, count=16)
        figures = distiller._anchor_step(condition, distiller.anchor, draws)
        for parameter in distiller.unet.parameters_of("student"):
            parameter.grad = None
        return figures["loss/anchor"].item()

    def distance() -> float:
        latents = sample_latents(distiller.unet, "student", model, condition, FOUR, seed=8)
        with torch.no_grad():
            images = decode_latents(model, latents)
            means = [classifier.features(part).mean(0) for part in (images, real)]
        return (means[0] - means[1]).square().sum().item()

    untrained = error(), distance()
    for iteration in range(8):
        trainer.iterate(iteration)
    assert error() < 0.75 * untrained[0]
    assert distance() < 0.5 * untrained[1]


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"diversity_anchor__weight": 0.05, "sampling__steps": 1},
            r"diversity_anchor.weight is 0.05, which leaves .*; set sampling.steps to 2 or more",
        ),
        (
            {"diversity_anchor__teacher_steps": 4},
            r"teacher_steps is 4 but has no effect, because diversity_anchor.weight is 0.0",
        ),
        (
            {"diversity_anchor__timestep": 499},
            r"timestep is 499 but has no effect, because diversity_anchor.weight is 0.0",
        ),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        demo_config(tmp_path, **overrides)


def test_the_anchors_guidance_counts_without_matching(tmp_path: Path) -> None:
    off = {"distribution_matching__enabled": "false", "distribution_matching__guidance": 3}
    with pytest.raises(ValueError, match=r"guidance is 3.0 but has no effect"):
        demo_config(tmp_path, **off)
    assert demo_config(tmp_path, **off, **ANCHORED).distribution_matching.guidance == 3
