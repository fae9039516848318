"""Random step grids: the plan of each iteration is drawn anew, so that one LoRA serves many.

arXiv 2605.06376 (section 3.2) draws the number of steps uniformly and their times anywhere, the
first at pure noise. Here each time stays within half a spacing of its evenly spaced place
(`step_ranges`): users run evenly spaced plans, and short runs learn nothing from steps that all
lie close together.
"""

from __future__ import annotations

import torch

from dmd2_core import StepCounts, StepPlan, step_ranges


def drawn_plan(counts: StepCounts, generator: torch.Generator) -> StepPlan:
    """A number of steps ~ U{fewest..most}, then each timestep ~ U over its own range."""
    fewest, most = counts
    num_steps = int(torch.randint(fewest, most + 1, (), generator=generator))
    return StepPlan(
        timesteps=tuple(
            int(torch.randint(places.start, places.stop, (), generator=generator))
            for places in step_ranges(num_steps)
        )
    )
