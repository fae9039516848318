"""Warnings in words, where a figure says that a training goes wrong.

Judged on what the student draws beside its teacher and on the balance of the game, never on the
critic's loss, which tells neither. docs/watching.md says the same for readers.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

WARNINGS_FILE = "warnings.txt"

COLLAPSED_VARIETY = 0.4
"""Of the teacher's variety. The demo's untrained student, blurred as it is, has 0.55 to 0.74 in 4
steps (4 and 8 prompts) and 0.50 in one: what is below has lost variety in training."""
FLAT_DEVIATION = 0.6
"""Of the teacher's deviation of latents. The demo's untrained student: 0.87 in 4 steps, 0.75 in
one."""
SATURATED_DEVIATION = 1.4
"""Of the teacher's deviation of latents. Guidance 3 instead of 1 gives the demo's 4-step pictures a
quarter more, and that is visible; what is trained should be within a tenth of its teacher."""
SATURATED_COLOUR = 1.6
"""Of the teacher's distance from gray: beyond it skin is orange and shadows are gone."""
TOO_BRIGHT, TOO_DARK = 1.5, 0.6
"""Of the teacher's brightness. A photograph's is about 0.45 of white: 0.7 is washed out, 0.27 is
dusk. Brightness that swings is the first sign of a critic that lags (figure 7 of the paper)."""
DISCRIMINATOR_WON = 0.95
"""Share of images, real ones and the student's alike, that it tells; 0.5 is guessing, and good
runs of the demo stay below 0.7. The images are noised at any of 1000 times, of which the noisiest
leave hardly a picture to tell: above this, all others are told without fail."""
DISCRIMINATOR_ITERATIONS = 100
"""So long on average: a single batch may be told by chance."""
DROWNING_RATIO = 3.0
"""Norm of the GAN's gradient at the samples over that of distribution matching; 0.06 to 0.15 in
good runs of the demo. At 3, and with directions that have nothing to do with each other, the sum
points within 18 degrees of the GAN's alone: training without distribution matching, which gives the
paper's SDXL student its worst patch FID and CLIP score."""
DROWNING_ITERATIONS = 100
"""So long on average: the student is updated in every fifth of them."""
RECOVERY = 0.1
"""An episode is over when the figure is so much of the threshold on its good side: no warning
returns because a figure wavers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """When to warn, and what to say."""

    name: str
    figures: tuple[str, ...]
    """The rule holds where all of them do."""
    threshold: float
    is_ceiling: bool
    """Whether values above the threshold are bad, or those below."""
    meaning: str
    remedy: str
    iterations: int = 1
    """The mean over at least so many iterations is what counts."""

    def worst_kept(self, values: Mapping[str, float]) -> float | None:
        """The figure that is nearest to being good; None where one is missing or not a number."""
        present = [values[name] for name in self.figures if name in values]
        if len(present) < len(self.figures) or any(value != value for value in present):
            return None
        return min(present) if self.is_ceiling else max(present)

    def is_broken(self, value: float) -> bool:
        return value > self.threshold if self.is_ceiling else value < self.threshold

    def is_well_again(self, value: float) -> bool:
        if self.is_ceiling:
            return value <= self.threshold * (1 - RECOVERY)
        return value >= self.threshold * (1 + RECOVERY)

    def sentence(self, value: float) -> str:
        side, more = ("above", "or more") if self.is_ceiling else ("below", "or less")
        said = f"is {value:.3g}" if len(self.figures) == 1 else f"are {value:.3g} {more}"
        if self.iterations > 1:
            said += f" on average of {self.iterations} iterations"
        return (
            f"{self.name}: {' and '.join(self.figures)} {said}, {side} {self.threshold:g}: "
            f"{self.meaning}. {self.remedy}."
        )


# Not "a higher critic.learning_rate": with a LoRA of high rank that made the demo's critic noisier,
# and what it tells the student with it.
_LAGGING_CRITIC = (
    "Go on from an earlier checkpoint with a lower student.learning_rate, or with another "
    "critic.learning_rate (lower if loss/critic jumps); in a new run, raise "
    "critic.updates_per_generator"
)
RULES: tuple[Rule, ...] = (
    Rule(
        name="collapse",
        figures=("validation/diversity_ratio",),
        threshold=COLLAPSED_VARIETY,
        is_ceiling=False,
        meaning="pictures of one prompt hardly differ, where the teacher's do",
        remedy=_LAGGING_CRITIC + " or lower distribution_matching.guidance",
    ),
    Rule(
        name="flat pictures",
        figures=("validation/latent_deviation_ratio",),
        threshold=FLAT_DEVIATION,
        is_ceiling=False,
        meaning="the student's pictures lose contrast, towards one gray or a blur",
        remedy=_LAGGING_CRITIC,
    ),
    Rule(
        name="saturation",
        figures=("validation/latent_deviation_ratio",),
        threshold=SATURATED_DEVIATION,
        is_ceiling=True,
        meaning="the student's pictures are far harsher than the teacher's",
        remedy=_LAGGING_CRITIC + " or lower distribution_matching.guidance",
    ),
    Rule(
        name="oversaturated colours",
        figures=("validation/colour_ratio",),
        threshold=SATURATED_COLOUR,
        is_ceiling=True,
        meaning="the student's colours are far stronger than the teacher's",
        remedy=_LAGGING_CRITIC + " or lower distribution_matching.guidance",
    ),
    Rule(
        name="too bright",
        figures=("validation/brightness_ratio",),
        threshold=TOO_BRIGHT,
        is_ceiling=True,
        meaning="the student's pictures are washed out beside the teacher's",
        remedy=_LAGGING_CRITIC,
    ),
    Rule(
        name="too dark",
        figures=("validation/brightness_ratio",),
        threshold=TOO_DARK,
        is_ceiling=False,
        meaning="the student's pictures are dark beside the teacher's",
        remedy=_LAGGING_CRITIC,
    ),
    Rule(
        name="the discriminator has won",
        figures=("discriminator/real_accuracy", "discriminator/fake_accuracy"),
        threshold=DISCRIMINATOR_WON,
        is_ceiling=True,
        iterations=DISCRIMINATOR_ITERATIONS,
        meaning="it tells every image, and what the student learns from it is no longer about "
        "pictures",
        remedy="Lower gan.learning_rate and go on; in a new run, lower gan.critic_weight, and see "
        "that the real images are of the kind that the teacher draws",
    ),
    Rule(
        name="the GAN drowns distribution matching",
        figures=("gradient/gan_over_matching",),
        threshold=DROWNING_RATIO,
        is_ceiling=True,
        iterations=DROWNING_ITERATIONS,
        meaning="the student follows the discriminator and forgets the teacher and the prompt",
        remedy="Start a new run with a lower gan.generator_weight; this one's is too high for "
        "this model",
    ),
)


@dataclass(slots=True)
class _Course:
    """A rule's figure of late."""

    recent: deque[tuple[float, int]] = field(default_factory=deque)
    """(value, iterations that it is the mean of), those that the rule looks at."""
    warned: bool = False

    def mean(self, value: float, num_iterations: int, needed: int) -> float | None:
        """With this value; None while there are too few iterations to judge."""
        self.recent.append((value, num_iterations))
        while sum(count for _, count in self.recent) - self.recent[0][1] >= needed:
            self.recent.popleft()
        counted = sum(count for _, count in self.recent)
        if counted < needed:
            return None
        return sum(value * count for value, count in self.recent) / counted


class HealthWatch:
    """Says each episode once, when it begins and when it is over; in the log and in a file."""

    def __init__(self, directory: Path, rules: Sequence[Rule] = RULES) -> None:
        self._file = directory / WARNINGS_FILE
        self._courses = [(rule, _Course()) for rule in rules]

    def look(self, iteration: int, figures: Mapping[str, float], num_iterations: int = 1) -> None:
        """`figures` as recorded after `iteration` iterations, the means of `num_iterations`."""
        for rule, course in self._courses:
            value = rule.worst_kept(figures)
            if value is None:
                continue
            mean = course.mean(value, num_iterations, rule.iterations)
            if mean is None:
                continue
            if not course.warned and rule.is_broken(mean):
                course.warned = True
                self._say(logging.WARNING, iteration, rule.sentence(mean))
            elif course.warned and rule.is_well_again(mean):
                course.warned = False
                words = f"over: {rule.name} ({' and '.join(rule.figures)} {mean:.3g})"
                self._say(logging.INFO, iteration, words)

    def _say(self, level: int, iteration: int, sentence: str) -> None:
        log.log(level, "iteration %d: %s", iteration, sentence)
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"iteration {iteration}: {sentence}\n")
