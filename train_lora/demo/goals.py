"""What the demo's student is meant to reach, and the sentences for what it did not."""

from __future__ import annotations

from .measure import SystemFigures

DISTANCE_TO_FIFTY, DISTANCE_TO_FOUR = 1.1, 0.5
ACCURACY, ACCURACY_BELOW_TEACHER = 0.95, 0.01
DIVERSITY_TO_FIFTY = 0.9


def shortfalls(
    teacher_50: SystemFigures, teacher_4: SystemFigures, student: SystemFigures
) -> list[str]:
    """One sentence for each goal that is missed, with the figure and the limit."""
    distance, accuracy = student.frechet_distance, student.prompt_accuracy
    limits = [
        ("Frechet distance", distance, DISTANCE_TO_FIFTY * teacher_50.frechet_distance, "most"),
        ("Frechet distance", distance, DISTANCE_TO_FOUR * teacher_4.frechet_distance, "most"),
        ("prompt accuracy", accuracy, ACCURACY, "least"),
        (
            "prompt accuracy",
            accuracy,
            teacher_50.prompt_accuracy - ACCURACY_BELOW_TEACHER,
            "least",
        ),
        ("diversity", student.diversity, DIVERSITY_TO_FIFTY * teacher_50.diversity, "least"),
    ]
    return [
        f"student's {name} is {value:.3f}; the goal is at {bound} {limit:.3f}"
        for name, value, limit, bound in limits
        if (value > limit if bound == "most" else value < limit)
    ]
