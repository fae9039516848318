"""What is recorded: means since the last record, trackers, what a resumed run replaces."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.train import watch_worker
from tests.train.launching import finish
from train_lora.monitor import Monitor
from train_lora.trackers import WANDB_ID, check_trackers
from train_lora.validate import ValidationResult
from train_lora.window import FigureWindow

from .tiny import demo_config, small_trainer

CPU = torch.device("cpu")


def scalars(run: Path) -> dict[str, dict[int, float]]:
    """Name -> {iteration: value} in the run's TensorBoard log, as TensorBoard shows it."""
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    found: dict[str, dict[int, float]] = {}
    for name in events.Tags()["scalars"]:
        pairs = [(event.step, event.value) for event in events.Scalars(name)]
        assert len(dict(pairs)) == len(pairs), f"{name} has a step twice"
        found[name] = dict(pairs)
    return found


def monitor(run: Path, first: int = 0, **overrides: object) -> Monitor:
    settings = {"logging__every": 4, "training__iterations": 100} | overrides
    config = demo_config(run, **settings)
    return Monitor(
        config, Accelerator(cpu=True), first_iteration=first, images_per_iteration=6,
        standing=lambda: {"learning_rate/student": 0.5},
    )  # fmt: skip


def figures(**values: float) -> dict[str, torch.Tensor]:
    return {name.replace("__", "/"): torch.tensor(value) for name, value in values.items()}


def test_means_are_over_the_iterations_that_have_the_figure() -> None:
    window = FigureWindow()
    for iteration in range(5):
        window.add(figures(loss__critic=float(iteration)))
        if iteration in (1, 4):
            window.add(figures(loss__matching=10.0 * iteration))
    window.add(figures(loss__critic=math.nan, loss__gan=math.inf))
    means = window.take(CPU)
    assert means["loss/critic"] == 2.0  # not the last, and not the one that was skipped
    assert means["loss/matching"] == 25.0
    assert math.isnan(means["loss/gan"])
    assert window.take(CPU) == {}


def test_records_hold_means_rates_speed_and_memory(tmp_path: Path) -> None:
    with monitor(tmp_path / "run") as watched:
        for done in range(1, 10):
            watched.note(done, figures(loss__critic=done), seconds=0.5)
    found = scalars(tmp_path / "run")
    assert found["loss/critic"] == {4: 2.5, 8: 6.5}
    assert found["learning_rate/student"] == {4: 0.5, 8: 0.5}
    assert found["samples_per_second"] == {4: 12.0, 8: 12.0}
    assert all(0.05 < value < 500 for value in found["memory/resident_gib"].values())


def test_the_ratio_of_gradients_is_that_of_their_means(tmp_path: Path) -> None:
    with monitor(tmp_path / "run", logging__every=2) as watched:
        watched.note(1, figures(gradient__gan=1.0, gradient__matching=2.0), seconds=1.0)
        watched.note(2, figures(gradient__gan=5.0, gradient__matching=2.0), seconds=1.0)
    assert scalars(tmp_path / "run")["gradient/gan_over_matching"] == {2: 1.5}


def test_the_end_of_a_run_is_recorded_whatever_the_rhythm(tmp_path: Path) -> None:
    with monitor(tmp_path / "run", training__iterations=6) as watched:
        for done in range(1, 7):
            watched.note(done, figures(loss__critic=done), seconds=1.0)
    assert scalars(tmp_path / "run")["loss/critic"] == {4: 2.5, 6: 5.5}


def test_a_resumed_run_replaces_what_was_recorded_after_its_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with monitor(run, logging__every=1) as watched:
        for done in range(1, 8):
            watched.note(done, figures(loss__critic=done), seconds=1.0)
    with monitor(run, first=5, logging__every=1) as watched:
        for done in range(6, 10):
            watched.note(done, figures(loss__critic=-done), seconds=1.0)
    expected = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: -6.0, 7: -7.0, 8: -8.0, 9: -9.0}
    assert scalars(run)["loss/critic"] == expected


def test_without_trackers_nothing_is_recorded_but_warnings_are(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with monitor(run, logging__every=1, logging__trackers="[]") as watched:
        for done in range(1, 150):
            watched.note(done, figures(gradient__gan=9.0, gradient__matching=1.0), seconds=1.0)
    assert [path.name for path in run.iterdir()] == ["warnings.txt"]
    (line,) = (run / "warnings.txt").read_text().splitlines()
    assert "iteration 100: the GAN drowns distribution matching" in line


def test_validation_is_saved_as_png_and_logged(tmp_path: Path) -> None:
    run, picture = tmp_path / "run", Image.new("RGB", (4000, 30), (200, 10, 10))
    result = ValidationResult(
        figures={"validation/diversity": 0.25}, pictures={"samples": picture, "panels": picture}
    )
    with monitor(run) as watched:
        watched.validated(12, result)
    for name in result.pictures:
        with Image.open(run / name / "000012.png") as saved:
            assert saved.tobytes() == picture.tobytes()
    assert scalars(run)["validation/diversity"] == {12: 0.25}
    events = EventAccumulator(str(run / "logs"))
    events.Reload()
    (logged,) = events.Images("panels")
    assert (logged.step, logged.width, logged.height) == (12, 2048, 15)


def test_a_training_records_every_figure_that_the_manual_lists(tmp_path: Path) -> None:
    trainer = small_trainer(
        tmp_path / "run", training__iterations=3, critic__updates_per_generator=2,
        logging__every=3,
    )  # fmt: skip
    trainer.run()
    found = scalars(tmp_path / "run")
    assert all(set(values) == {3} for values in found.values())
    manual = (Path(__file__).parents[2] / "docs" / "watching.md").read_text(encoding="utf-8")
    assert [name for name in found if f"`{name}`" not in manual] == []
    expected = {
        *("loss/matching", "loss/critic", "loss/gan_generator", "loss/gan_critic"),
        *("gradient_norm/student", "gradient_norm/critic", "gradient/matching", "gradient/gan"),
        *("gradient/gan_over_matching", "sample/mean", "sample/deviation"),
        *("real/mean", "real/deviation"),
        *("discriminator/real_accuracy", "discriminator/fake_accuracy", "samples_per_second"),
        *("learning_rate/student", "learning_rate/critic", "learning_rate/discriminator"),
        *("skipped_updates/student", "skipped_updates/critic", "memory/resident_gib"),
    }
    assert set(found) == expected


# -- Weights & Biases ------------------------------------------------------------------------------


def test_a_missing_wandb_is_said_before_anything_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = demo_config(tmp_path / "run", logging__trackers="tensorboard,wandb")
    real = importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            "importlib.util.find_spec", lambda name, *a: None if name == "wandb" else real(name, *a)
        )
        with pytest.raises(ValueError, match=r"wandb is not installed; install it: pip install"):
            check_trackers(config)
        check_trackers(demo_config(tmp_path / "run"))


def test_wandb_is_not_imported_unless_chosen(tmp_path: Path) -> None:
    with monitor(tmp_path / "run") as watched:
        watched.note(1, figures(loss__critic=1.0), seconds=1.0)
    assert "wandb" not in sys.modules


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_offline_keeps_the_run_in_its_folder_and_resumes_under_its_name(
    tmp_path: Path,
) -> None:
    run = tmp_path / "run"
    for first in (0, 2):
        finish(watch_worker.record, run, first, environment={"WANDB_MODE": "offline"})
    name = (run / WANDB_ID).read_text().strip()
    assert len(name) == 12
    kept = sorted((run / "wandb").glob(f"offline-run-*-{name}"))
    assert 1 <= len(kept) <= 2  # one folder for each process, or one that went on
    assert all(list(folder.glob("*.wandb")) for folder in kept)
    assert list(run.glob("wandb/*/files/media/images/samples_*.png"))
    assert not (run / "logs").exists()
