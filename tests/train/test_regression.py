"""Regression on the teacher's pairs: as the stage before DMD2, and in DMD throughout."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor

from dmd2_core import StepPlan, coefficients
from train_lora import prepare
from train_lora.checkpoint import check_config, read_state, restore, tensors_of
from train_lora.config import Config
from train_lora.config_effects import ineffective_keys
from train_lora.config_load import load
from train_lora.config_text import to_toml
from train_lora.data.demo_data import demo_captions
from train_lora.data.encode import Part
from train_lora.data.store import MemoryTable
from train_lora.data.training_data import load_training_data
from train_lora.demo.teacher import load_teacher
from train_lora.distill import Distiller, Pairs
from train_lora.draws import sample_draws
from train_lora.finish import recipe_of
from train_lora.loop import Trainer
from train_lora.trainer import build_trainer

from .tiny import (
    demo_config,
    random_batch,
    random_components,
    random_condition,
    random_distiller,
    small_data,
    weights,
)

STAGES = {
    "sampling__steps": 1,
    "sampling__conditioning_timestep": 399,
    "regression__warmup_iterations": 2,
    "regression__pairs": "pairs",
    "regression__learning_rate": 1e-3,
    "critic__warmup_iterations": 1,
    "critic__updates_per_generator": 2,
    "training__iterations": 6,
    "checkpoint__every": 1,
    "checkpoint__keep_last": 9,
    "logging__trackers": "[]",
}
DMD = {"training__objective": "dmd", "regression__pairs": "pairs"}


def random_pairs(count: int = 5) -> MemoryTable:
    generator = torch.Generator().manual_seed(9)
    condition = random_condition(count, generator)
    columns = {
        "noise": torch.randn(count, 4, 16, 16, generator=generator),
        "latents": torch.randn(count, 4, 16, 16, generator=generator),
        "hidden": condition.hidden,
        "pooled": condition.pooled,
    }
    return MemoryTable(part=Part(columns=columns, captions=["a scene"] * count))


def trainer_in(directory: Path, num_pairs: int = 5, **overrides: Any) -> Trainer:
    sizes = {"training__batch_size": 2, "student__rank": 4, "critic__rank": 4}
    given = sizes | {"validation__every": 0} | overrides
    config = demo_config(directory, **{k: v for k, v in given.items() if v is not None})
    data = replace(small_data(), pairs=random_pairs(num_pairs))
    return build_trainer(config, random_components(), data, Accelerator(cpu=True))


def all_tensors(trainer: Trainer) -> dict[str, Tensor]:
    return {
        f"{file}/{name}": tensor.detach().clone()
        for file, part in tensors_of(trainer).items()
        for name, tensor in part.items()
    }


def gradient(distiller: Distiller) -> Tensor:
    found = [p.grad.flatten() for p in distiller.unet.parameters_of("student")]
    return torch.cat(found)


@pytest.fixture
def distiller(tmp_path: Path) -> Distiller:
    found = random_distiller(demo_config(tmp_path / "run", **DMD, gan__enabled="true"))
    return replace(found, plan=StepPlan.evenly(1, conditioning_timestep=399))


@pytest.fixture
def pairs() -> Pairs:
    columns = random_pairs(2).part.columns
    condition = random_condition(2, torch.Generator().manual_seed(4))
    return Pairs(noise=columns["noise"], latents=columns["latents"], condition=condition)


def test_the_step_is_the_squared_error_of_the_one_step_sample(
    distiller: Distiller, pairs: Pairs
) -> None:
    """Written out: pure noise, told 399, x0 by the coefficients of 399."""
    reference = copy.deepcopy(distiller)
    figures = distiller.regression_step(pairs, 0.5)

    t = torch.full((2,), 399)
    alpha, sigma = coefficients(reference.components.schedule, t, pairs.noise)
    assert alpha.flatten()[0].item() ** 2 == pytest.approx(0.4260863)
    reference.unet._activate("student")
    x0 = (pairs.noise - sigma * reference.unet(pairs.noise, t, pairs.condition)) / alpha
    loss = (x0 - pairs.latents).square().mean()
    loss.backward()
    assert figures["loss/regression"].item() == pytest.approx(loss.item(), rel=1e-5)
    torch.testing.assert_close(gradient(distiller), 0.5 * gradient(reference), rtol=1e-4, atol=1e-7)
    assert gradient(distiller).norm() > 0
    assert all(p.grad is None for p in distiller.unet.parameters_of("critic"))


def test_dmds_generator_gradient_is_the_sum_of_its_parts(
    distiller: Distiller, pairs: Pairs
) -> None:
    """Matching and GAN from the one step, and a quarter of the regression's."""
    batch = random_batch(2, torch.Generator().manual_seed(5))

    def generator_step(of: Distiller, with_pairs: Pairs | None) -> dict[str, Tensor]:
        draws = sample_draws(11, first=0, count=2)
        return of.generator_step(
            of.student_sample(batch, 0, draws, with_graph=True), draws, with_pairs
        )

    alone, regression = copy.deepcopy(distiller), copy.deepcopy(distiller)
    figures = generator_step(distiller, pairs)
    generator_step(alone, None)
    regression.regression_step(pairs)
    assert distiller.config.regression.weight == 0.25
    parts = gradient(alone) + 0.25 * gradient(regression)
    assert (gradient(distiller) - parts).norm() < 1e-5 * parts.norm()
    assert 0.25 * gradient(regression).norm() > 1e-2 * parts.norm()  # else this would prove little
    assert {"loss/matching", "loss/gan_generator", "loss/regression"} <= set(figures)


def test_the_stages_follow_each_other(tmp_path: Path) -> None:
    """Two iterations of regression, one of the critic alone, then every other of DMD2's."""
    trainer = trainer_in(tmp_path / "run", **STAGES)
    moved, rates, losses = [], [], []
    for iteration in range(6):
        before = weights(trainer, "student"), weights(trainer, "critic")
        figures = trainer.iterate(iteration)
        after = weights(trainer, "student"), weights(trainer, "critic")
        moved.append(tuple(not torch.equal(b, a) for b, a in zip(before, after, strict=True)))
        rates.append(trainer.student.optimizer.param_groups[0]["lr"])
        losses.append({name for name in figures if name.startswith("loss/")})
    assert [student for student, _ in moved] == [True, True, False, True, False, True]
    assert [critic for _, critic in moved] == [False, False, True, True, True, True]
    assert losses[:2] == [{"loss/regression"}] * 2
    assert losses[2] == {"loss/critic", "loss/gan_critic"}
    assert losses[3] == losses[2] | {"loss/matching", "loss/gan_generator"}
    falling = [1.0, 1.0, 1.0, 1.0, 2 / 3, 1 / 3]  # the demo's learning_rate_decay is 0.5
    assert rates[:2] == pytest.approx([1e-3] * 2)
    assert rates[3] == pytest.approx(trainer.config.student.learning_rate * falling[3])
    # Adam's moments are DMD2's own: two updates of the student's, not four.
    steps = {int(state["step"]) for state in trainer.student.optimizer.state.values()}
    assert steps == {2}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    trainer = trainer_in(tmp_path_factory.mktemp("straight") / "run", **STAGES)
    trainer.run()
    return trainer


@pytest.mark.parametrize("iteration", [1, 2, 4])
def test_a_run_goes_on_from_any_stage_to_the_same_bits(
    finished: Trainer, tmp_path: Path, iteration: int
) -> None:
    """Within the regression, at its end, and in DMD2."""
    checkpoint = finished.checkpoints.run / "checkpoints" / f"{iteration:06d}"
    resumed = trainer_in(tmp_path / "run", **STAGES)
    restore(resumed, checkpoint, read_state(checkpoint))
    resumed.run()
    straight, again = all_tensors(finished), all_tensors(resumed)
    assert set(straight) == set(again)
    for name, tensor in straight.items():
        assert torch.equal(tensor, again[name]), name


def test_a_run_goes_on_with_its_own_pairs_and_stages(finished: Trainer, tmp_path: Path) -> None:
    checkpoint = finished.checkpoints.run / "checkpoints" / "000003"
    state = read_state(checkpoint)
    other = trainer_in(tmp_path / "run", num_pairs=4, **STAGES)
    with pytest.raises(ValueError, match=r"number of pairs is 5, now 4; set --regression.pairs to"):
        restore(other, checkpoint, state)
    for key, value, allowed in (
        ("regression__warmup_iterations", 3, False),
        ("regression__learning_rate", 1e-4, True),
        ("regression__pairs", "elsewhere", True),
    ):
        config = demo_config(tmp_path, **_small(STAGES | {key: value}))
        if allowed:
            check_config(state, config, "run")
        else:
            with pytest.raises(ValueError, match=key.replace("__", ".")):
                check_config(state, config, "run")


def _small(overrides: dict[str, Any]) -> dict[str, Any]:
    sizes = {"training__batch_size": 2, "student__rank": 4, "critic__rank": 4}
    return sizes | {"validation__every": 0} | overrides


def gradient_of_first_update(directory: Path, **overrides: Any) -> Tensor:
    """What the student's optimizer is given: (all parameters,)."""
    trainer, seen = trainer_in(directory, **overrides), []
    trainer.student.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad.flatten() for p in trainer.student.parameters)
    )
    trainer.iterate(0)
    return torch.cat(seen)


@pytest.mark.parametrize("settings", [STAGES, DMD], ids=["stages", "dmd"])
def test_accumulated_pairs_are_the_same_update_as_one_batch(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    size, count = "training__batch_size", "training__gradient_accumulation_steps"
    whole = gradient_of_first_update(tmp_path / "a", **settings | {size: 4, count: 1})
    parts = gradient_of_first_update(tmp_path / "b", **settings | {size: 2, count: 2})
    assert (whole - parts).norm() < 1e-5 * whole.norm()


# -- the embedded teacher --------------------------------------------------------------------------


def test_the_stage_brings_the_student_nearer_to_the_teachers_images(tmp_path: Path) -> None:
    """Of the pairs that `dmd2 pairs` makes, the error of one step falls well below that of the
    untrained student, which itself beats the mean image."""
    config = demo_config(
        tmp_path / "run",
        sampling__steps=1,
        sampling__conditioning_timestep=399,
        regression__warmup_iterations=8,
        regression__learning_rate=2e-3,
        regression__pairs=tmp_path / "pairs",
        regression__num_pairs=16,
        regression__teacher_steps=4,
        training__batch_size=8,
        gan__enabled="false",
        data__prompts=tmp_path / "prompts.txt",
        validation__every=0,
    )
    (tmp_path / "prompts.txt").write_text("\n".join(demo_captions(16)))
    prepare.make_pairs(config)
    teacher = load_teacher()
    trainer = build_trainer(
        config, teacher, load_training_data(config, teacher), Accelerator(cpu=True)
    )
    pairs = trainer.data.pair_batch(first=0, size=16, seed=0)

    def error() -> float:
        with torch.no_grad(), trainer.distiller.unet.role("student"):
            told = torch.full((16,), 399)
            x0 = trainer.distiller.denoiser(pairs.noise, told, pairs.condition)
            return (x0 - pairs.latents).square().mean().item()

    mean_image = (pairs.latents - pairs.latents.mean(0)).square().mean().item()
    untrained = error()
    for iteration in range(8):
        trainer.iterate(iteration)
    assert untrained < mean_image
    assert error() < 0.75 * untrained


# -- settings --------------------------------------------------------------------------------------


def test_the_first_papers_objective_sets_what_nobody_sets(tmp_path: Path) -> None:
    config = demo_config(tmp_path, **DMD)
    assert config.critic.updates_per_generator == 1
    assert config.sampling.steps == 1
    assert not config.gan.enabled
    assert config.regression.weight == 0.25
    # Beside it on the command line, what is set stands; in the same way in a file.
    mixed = {"critic__updates_per_generator": 5, "gan__enabled": "true"}
    assert demo_config(tmp_path, **DMD, **mixed).critic.updates_per_generator == 5
    assert demo_config(tmp_path, **DMD, **mixed).gan.enabled
    assert demo_config(tmp_path).critic.updates_per_generator == 3  # the preset's own
    file = tmp_path / "run.toml"
    file.write_text(to_toml(config), encoding="utf-8")
    again = load(file=file).config  # without what the GAN would take
    for section in ("training", "sampling", "critic", "regression", "distribution_matching"):
        assert getattr(again, section) == getattr(config, section)
    assert not again.gan.enabled
    file.write_text('training = {objective = "dmd"}\nregression = {pairs = "p"}\n')
    back = [("training.objective", "dmd2"), ("output.directory", "run")]
    assert load(preset="demo", file=file, overrides=back[1:]).config.sampling.steps == 1
    with pytest.raises(
        ValueError, match=r"regression.pairs is 'p' but has no effect, because"
    ) as e:
        load(preset="demo", file=file, overrides=[*back, ("regression.pairs", "p")])
    assert "training.objective is 'dmd2'" in str(e.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"regression__warmup_iterations": 2, "sampling__steps": 1},
            r"regression.pairs is not set, but regression.warmup_iterations is 2, which takes",
        ),
        ({"training__objective": "dmd"}, r"regression.pairs is not set, but training.objective is"),
        (
            {"regression__warmup_iterations": 2, "regression__pairs": "p"},
            r"sampling.steps is 4, but .* in one step; set sampling.steps to 1, or regression",
        ),
        (
            DMD | {"sampling__timesteps": "[999, 499]"},
            r'sampling.timesteps is \[999, 499\], but training.objective is "dmd"',
        ),
        (DMD | {"regression__learning_rate": 1e-4}, r"because regression.warmup_iterations is 0"),
        (
            STAGES | {"regression__weight": 1.0},
            r"regression.weight is 1.0 but has no effect, because training.objective is 'dmd2'",
        ),
        (
            STAGES | {"regression__warmup_iterations": 5},
            r"regression.warmup_iterations is 5, but training.iterations is 6, so the student",
        ),
    ],
)
def test_settings_that_do_not_go_together(
    tmp_path: Path, overrides: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        demo_config(tmp_path, **overrides)


def test_a_recipe_tells_the_stages_and_no_folder(tmp_path: Path, shared_components: Any) -> None:
    config: Config = demo_config(tmp_path, **STAGES | {"regression__pairs": tmp_path / "pairs"})
    told = recipe_of(config, shared_components, 6).trained_with
    assert told is not None
    assert told["regression"]["pairs"] == "pairs"
    assert told["regression"]["warmup_iterations"] == 2
    assert "weight" not in told["regression"]
    assert "regression.learning_rate" in ineffective_keys(demo_config(tmp_path))
