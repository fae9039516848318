"""Warnings in words: said once for each episode, with figure, value, threshold and remedy."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest

from train_lora.health import (
    DISCRIMINATOR_ITERATIONS,
    DISCRIMINATOR_WON,
    RULES,
    WARNINGS_FILE,
    HealthWatch,
)

SICK = {
    "collapse": {"validation/diversity_ratio": 0.2},
    "flat pictures": {"validation/latent_deviation_ratio": 0.3},
    "saturation": {"validation/latent_deviation_ratio": 1.8},
    "oversaturated colours": {"validation/colour_ratio": 2.5},
    "too bright": {"validation/brightness_ratio": 1.9},
    "too dark": {"validation/brightness_ratio": 0.4},
    "the discriminator has won": {
        "discriminator/real_accuracy": 0.99,
        "discriminator/fake_accuracy": 0.98,
    },
    "the GAN drowns distribution matching": {"gradient/gan_over_matching": 7.0},
}
HEALTHY = {
    "validation/diversity_ratio": 0.95,
    "validation/latent_deviation_ratio": 1.02,
    "validation/colour_ratio": 1.1,
    "validation/brightness_ratio": 0.97,
    "discriminator/real_accuracy": 0.7,
    "discriminator/fake_accuracy": 0.6,
    "gradient/gan_over_matching": 0.2,
}


def said(directory: Path) -> list[str]:
    file = directory / WARNINGS_FILE
    return file.read_text().splitlines() if file.exists() else []


def test_every_rule_has_its_case() -> None:
    assert {rule.name for rule in RULES} == set(SICK)


@pytest.mark.parametrize("name", SICK)
def test_a_sick_run_is_told_which_figure_its_value_the_threshold_and_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    watch = HealthWatch(tmp_path)
    with caplog.at_level(logging.INFO):
        watch.look(50, HEALTHY, 200)
        assert said(tmp_path) == []
        for iteration in (250, 450, 650):
            watch.look(iteration, HEALTHY | SICK[name], 200)
    (line,) = said(tmp_path)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == line
    (rule,) = (rule for rule in RULES if rule.name == name)
    assert line.startswith(f"iteration 250: {name}: ")
    assert all(figure in line for figure in SICK[name])
    assert f"{min(SICK[name].values()):.3g}" in line
    assert f"{rule.threshold:g}: " in line
    assert "learning_rate" in line or "generator_weight" in line


def test_a_warning_returns_only_after_the_figure_was_clearly_well_again(tmp_path: Path) -> None:
    watch = HealthWatch(tmp_path)
    for iteration, value in enumerate((0.3, 0.41, 0.39, 0.43, 0.5, 0.39)):
        watch.look(iteration, {"validation/diversity_ratio": value})
    lines = said(tmp_path)
    assert [line.split(":")[0] for line in lines] == ["iteration 0", "iteration 4", "iteration 5"]
    assert "over: collapse" in lines[1]


def test_a_discriminator_must_win_both_sides_for_long(tmp_path: Path) -> None:
    watch = HealthWatch(tmp_path)
    real, fake = "discriminator/real_accuracy", "discriminator/fake_accuracy"
    for iteration in range(10, 500, 10):
        watch.look(iteration, {real: 1.0, fake: 0.9}, 10)  # one side only
    assert said(tmp_path) == []
    watch = HealthWatch(tmp_path)
    for iteration in range(10, DISCRIMINATOR_ITERATIONS, 10):  # not for long enough
        watch.look(iteration, {real: 1.0, fake: 1.0}, 10)
    assert said(tmp_path) == []
    watch.look(DISCRIMINATOR_ITERATIONS, {real: 1.0, fake: 1.0}, 10)
    (line,) = said(tmp_path)
    assert f"are 1 or more on average of 100 iterations, above {DISCRIMINATOR_WON}" in line


def test_the_mean_over_the_window_counts_and_old_records_leave_it(tmp_path: Path) -> None:
    watch = HealthWatch(tmp_path)
    name = "gradient/gan_over_matching"
    for iteration in range(50, 500, 50):
        watch.look(iteration, {name: 1.0}, 50)
    watch.look(500, {name: 4.5}, 50)  # with the record before: 2.75
    assert said(tmp_path) == []
    watch.look(550, {name: 2.5}, 50)  # 3.5
    (line,) = said(tmp_path)
    assert "iteration 550" in line
    assert "is 3.5 on average" in line


def test_what_is_absent_or_not_a_number_says_nothing(tmp_path: Path) -> None:
    watch = HealthWatch(tmp_path)
    watch.look(1, {"loss/critic": 1e9, "validation/diversity_ratio": math.nan})
    assert said(tmp_path) == []
