"""The sentences of what the demo's student did not reach."""

from __future__ import annotations

from dataclasses import replace

from train_lora.demo.goals import shortfalls
from train_lora.demo.measure import SystemFigures

FIFTY = SystemFigures(
    frechet_distance=30.0,
    prompt_accuracy=0.98,
    diversity=20.0,
    network_evaluations=100,
    seconds_per_image=1.0,
)
FOUR = replace(FIFTY, frechet_distance=100.0)
STUDENT = replace(FIFTY, frechet_distance=33.0, prompt_accuracy=0.97, diversity=18.0)


def test_nothing_is_said_of_goals_just_reached() -> None:
    assert shortfalls(FIFTY, FOUR, STUDENT) == []


def test_each_missed_goal_is_said_with_its_figure() -> None:
    assert shortfalls(FIFTY, FOUR, replace(STUDENT, frechet_distance=33.1)) == [
        "student's Frechet distance is 33.100; the goal is at most 33.000"
    ]
    assert len(shortfalls(FIFTY, FOUR, replace(STUDENT, frechet_distance=50.1))) == 2
    assert shortfalls(FIFTY, FOUR, replace(STUDENT, prompt_accuracy=0.96)) == [
        "student's prompt accuracy is 0.960; the goal is at least 0.970"
    ]
    assert len(shortfalls(FIFTY, FOUR, replace(STUDENT, prompt_accuracy=0.94))) == 2
    assert shortfalls(FIFTY, FOUR, replace(STUDENT, diversity=17.9)) == [
        "student's diversity is 17.900; the goal is at least 18.000"
    ]
