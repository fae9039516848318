"""What `dmd2 demo` promises, read off one real run of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

SYSTEMS = ("teacher_50", "teacher_4", "student_4")


@pytest.fixture(scope="module")
def report(demo_output: Path) -> dict[str, Any]:
    return json.loads((demo_output / "report.json").read_text())


def test_report_is_complete(report: dict[str, Any]) -> None:
    columns = {
        "frechet_distance",
        "prompt_accuracy",
        "diversity",
        "network_evaluations",
        "seconds_per_image",
    }
    for name in SYSTEMS:
        assert columns <= set(report[name])
    assert {"train_seconds", "peak_memory_mb", "seed"} <= set(report)
    assert [report[name]["network_evaluations"] for name in SYSTEMS] == [100, 8, 4]


def test_teacher_and_student_paint_what_the_caption_says(report: dict[str, Any]) -> None:
    teacher, _, student = (report[name] for name in SYSTEMS)
    assert teacher["prompt_accuracy"] >= 0.97
    assert student["prompt_accuracy"] >= max(0.95, teacher["prompt_accuracy"] - 0.02)
    assert student["diversity"] >= 0.9 * teacher["diversity"]


def test_the_student_is_near_fifty_steps_and_far_better_than_four(report: dict[str, Any]) -> None:
    teacher, few, student = (report[name] for name in SYSTEMS)
    # 0.93 was measured, on two seeds; other CPUs round differently, and runs scatter by a tenth.
    assert student["frechet_distance"] <= 1.25 * teacher["frechet_distance"]
    assert student["frechet_distance"] <= 0.5 * few["frechet_distance"]


def test_the_table_and_the_three_paths_are_printed(demo_output: Path) -> None:
    printed = (demo_output / "stdout.txt").read_text()
    assert all(name in printed for name in SYSTEMS)
    for name in ("dmd2_demo_4step.safetensors", "comparison.png", "report.json"):
        assert str(demo_output / name) in printed
        assert (demo_output / name).is_file()


def test_the_comparison_shows_three_rows(demo_output: Path) -> None:
    with Image.open(demo_output / "comparison.png") as picture:
        assert picture.width > 8 * 128
        assert picture.height > 3 * 128
