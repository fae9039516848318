"""Validation: reproducible pictures and figures, honest panels, and no trace in the training."""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from dmd2_core import SeededNoise
from train_lora.loop import Trainer
from train_lora.metrics.diversity import diversity
from train_lora.metrics.looks import thumbnails
from train_lora.panels import panel_rows, panel_timesteps
from train_lora.validate import TEACHER_FILE, Validation

from .tiny import small_trainer, weights

SETTINGS = {
    "validation__every": 2,
    "validation__num_prompts": 3,
    "distribution_matching__guidance": 3.0,
}


@pytest.fixture(autouse=True)
def _few_teacher_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("train_lora.validate.TEACHER_STEPS", 3)


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    """After two iterations, so that student and critic differ from the teacher."""
    trainer = small_trainer(tmp_path / "run", **SETTINGS)
    for iteration in range(2):
        trainer.iterate(iteration)
    return trainer


def again(trainer: Trainer) -> Validation:
    """As another process of the run would build it."""
    return Validation(
        config=trainer.config,
        distiller=trainer.distiller,
        captions=trainer.data.captions,
        average=trainer.average,
    )


def test_the_same_weights_give_the_same_figures_and_pictures(trainer: Trainer) -> None:
    first, second = trainer.validation.run(), trainer.validation.run()
    assert first is not None
    assert second is not None
    assert first.figures == second.figures
    assert list(first.pictures) == ["samples", "panels"]
    for name, picture in first.pictures.items():
        assert picture.tobytes() == second.pictures[name].tobytes()


def test_figures_speak_of_the_student_and_of_the_teacher(trainer: Trainer) -> None:
    validation = trainer.validation
    result = validation.run()
    assert result is not None
    found = {name.removeprefix("validation/"): value for name, value in result.figures.items()}
    teacher = validation._teacher
    assert teacher is not None
    assert teacher.images.shape == (6, 3, 128, 128)
    vectors = thumbnails(teacher.images).view(3, 2, -1)
    assert found["diversity_teacher"] == pytest.approx(diversity(vectors))
    with trainer.average.applied():
        latents = validation._draw("student", trainer.distiller.plan)
    assert found["latent_mean"] == pytest.approx(float(latents.mean()))
    assert found["latent_deviation"] == pytest.approx(float(latents.std()))
    for name in ("brightness", "contrast", "colour", "sharpness", "diversity", "latent_deviation"):
        assert found[f"{name}_ratio"] == pytest.approx(found[name] / found[f"{name}_teacher"])
    assert found["statistics_distance"] > 0
    manual = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
    plain = [n for n in found if not n.endswith(("_teacher", "_ratio"))]
    assert [name for name in plain if f"`{name}`" not in manual] == []


def test_a_student_like_its_teacher_is_at_distance_zero(tmp_path: Path) -> None:
    """An untrained adapter that samples as the teacher does here: same plan, DMD2's noise."""
    trainer = small_trainer(tmp_path / "run", **SETTINGS)
    validation = trainer.validation
    latents = validation._draw("teacher", trainer.distiller.plan)
    validation._teacher, validation._knows_teacher = validation._measured(latents), True
    result = validation.run()
    assert result is not None
    assert result.figures["validation/picture_distance"] == pytest.approx(0, abs=1e-6)
    assert result.figures["validation/statistics_distance"] == pytest.approx(0, abs=1e-5)
    assert result.figures["validation/diversity_gap"] == pytest.approx(0, abs=1e-5)


def test_the_teacher_is_drawn_once_for_a_run(trainer: Trainer) -> None:
    first = trainer.validation.run()
    file = Path(trainer.config.output.directory) / TEACHER_FILE
    written = file.read_bytes(), file.stat().st_mtime_ns
    calls: list[str] = []
    resumed = again(trainer)
    draw = resumed._draw
    resumed._draw = lambda role, *a, **k: calls.append(role) or draw(role, *a, **k)  # type: ignore[method-assign]
    second = resumed.run()
    assert calls == ["student"]
    assert first is not None
    assert second is not None
    assert first.figures == second.figures

    file.write_bytes(written[0][:-100])  # cut short: drawn again
    assert again(trainer).run().figures == first.figures  # type: ignore[union-attr]
    assert file.read_bytes() == written[0]

    other = again(trainer)
    other.prompts[0] = "something else"  # another stamp
    assert other._kept(file) is None


def test_other_pieces_draw_the_same_pictures(
    trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = again(trainer)._draw("student", trainer.distiller.plan)
    monkeypatch.setattr("train_lora.validate.rows_at_once", lambda *_: 4)
    other = again(trainer)._draw("student", trainer.distiller.plan)
    # Kernels differ with the batch in the last bits; the noise does not.
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_panels_show_what_teacher_and_critic_make_of_the_same_noised_samples(
    trainer: Trainer,
) -> None:
    distiller = trainer.distiller
    condition = trainer.validation.condition[:3]
    x0 = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(4))
    rows = dict(panel_rows(distiller, x0, condition, seed=5, piece_rows=2))
    assert panel_timesteps(distiller) == [260, 500, 740]
    assert torch.equal(rows.pop("student's sample"), x0)
    assert len(rows) == 6
    schedule, unet = distiller.components.schedule, distiller.unet

    @torch.no_grad()
    def x0_of(role: str, t: int, text: object) -> Tensor:
        alpha = schedule.alphas_cumprod[t].sqrt().float()
        sigma = (1 - schedule.alphas_cumprod[t]).sqrt().float()
        x_t = alpha * x0 + sigma * SeededNoise(5)(1000 + t, x0)
        with unet.role(role):
            return (x_t - sigma * unet(x_t, torch.full((3,), t), text)) / alpha

    for t in (260, 500, 740):
        without = x0_of("teacher", t, condition.zeros_like())
        teacher = without + 3.0 * (x0_of("teacher", t, condition) - without)
        # float32; at t = 740 errors of the network are amplified four times.
        torch.testing.assert_close(rows[f"teacher, from t = {t}"], teacher, rtol=1e-3, atol=1e-3)
        critic = x0_of("critic", t, condition)
        torch.testing.assert_close(rows[f"critic, from t = {t}"], critic, rtol=1e-3, atol=1e-3)
        assert not torch.allclose(teacher, critic, atol=1e-2)


@pytest.mark.parametrize(
    ("overrides", "pictures"),
    [({"validation__panels": "false"}, ["samples"]), ({}, ["samples", "panels"])],
)
def test_panels_are_an_option(
    tmp_path: Path, overrides: dict[str, object], pictures: list[str]
) -> None:
    result = small_trainer(tmp_path / "run", **(SETTINGS | overrides)).validation.run()
    assert result is not None
    assert list(result.pictures) == pictures


def test_other_processes_draw_along_but_keep_nothing(tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run", **SETTINGS)
    trainer.validation.is_main_process = False
    roles: list[str] = []
    draw = trainer.validation._draw
    trainer.validation._draw = lambda role, *a, **k: roles.append(role) or draw(role, *a, **k)  # type: ignore[method-assign]
    assert trainer.validation.run() is None
    assert roles == ["teacher", "student"]
    assert not (tmp_path / "run").exists()


def test_validation_leaves_no_trace_in_the_training(tmp_path: Path) -> None:
    common = {
        "training__iterations": 4, "critic__updates_per_generator": 2, "logging__trackers": "[]",
        "checkpoint__every": 0,
    }  # fmt: skip
    with_it = small_trainer(tmp_path / "with", **(SETTINGS | common | {"validation__every": 1}))
    without = small_trainer(
        tmp_path / "without",
        **(SETTINGS | common | {"validation__every": 0, "validation__num_prompts": None}),
    )
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    with_it.run()
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(numpy.random.get_state()))
    without.run()
    assert len(list((tmp_path / "with" / "samples").iterdir())) == 4
    for role in ("student", "critic"):
        assert torch.equal(weights(with_it, role), weights(without, role))
    assert all(map(torch.equal, with_it.average.averages, without.average.averages))
    with_it.export(tmp_path / "a.safetensors")
    without.export(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
