"""Where the steps lie of a student that is trained for a range of numbers of steps.

One number is drawn for each iteration, and each place within `step_ranges` of it: the trainer
draws there (train_lora/step_grids.py), and a recipe says by it which plans the student knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from .few_step import Timestep
from .schedule import NUM_TIMESTEPS

StepCounts = tuple[int, int]
"""The fewest and the most steps."""
MOST_STEPS = 100


def step_ranges(num_steps: int) -> tuple[range, ...]:
    """The integer timesteps that each of `num_steps` steps may take: 4 gives 999, 625..874, ...

    The first is 999, pure noise. Each other reaches half the spacing to both sides of its evenly
    spaced place, so that they never overlap, and any choice descends.
    """
    assert 1 <= num_steps <= MOST_STEPS
    spacings = (2 * i - 1 for i in range(1, num_steps + 1))  # in halves
    edges = [NUM_TIMESTEPS - half * NUM_TIMESTEPS // (2 * num_steps) for half in spacings]
    later = (range(low, high) for high, low in pairwise(edges))
    return (range(NUM_TIMESTEPS - 1, NUM_TIMESTEPS), *later)


def check_step_counts(field: str, counts: object) -> StepCounts:
    """`counts` as (fewest, most); ValueError if it is anything else."""
    values = tuple(counts) if isinstance(counts, list | tuple) else ()
    if len(values) == 2 and all(type(value) is int for value in values):
        fewest, most = values
        if 1 <= fewest <= most <= MOST_STEPS and most > 1:
            return fewest, most
    text = repr(counts)
    raise ValueError(
        f"{field} is {text if len(text) <= 60 else text[:57] + '...'}: give the fewest and the "
        f"most steps, such as [2, 8], within 1..{MOST_STEPS}, or leave it out"
    )


def is_within(timesteps: Sequence[Timestep], counts: StepCounts) -> bool:
    """Whether a student of `counts` steps was trained at these timesteps together."""
    if not counts[0] <= len(timesteps) <= counts[1]:
        return False
    return all(
        t in allowed for t, allowed in zip(timesteps, step_ranges(len(timesteps)), strict=True)
    )
