"""The diversity anchor: what the student's first step learns in place of matching.

DP-DMD (arXiv 2602.03139): matching seeks modes, and what the first step decides, layout and pose,
is where diversity goes first. So the first step follows the teacher from the same noise, and the
losses of the other steps leave it alone.
"""

from __future__ import annotations

from torch import Tensor

from dmd2_core import NoiseSchedule, StepPlan, coefficients, few_step_sample
from dmd2_core.few_step import Denoise

from .config_anchor import DiversityAnchorConfig


def anchor_plan(settings: DiversityAnchorConfig, student: StepPlan) -> StepPlan:
    """The teacher's `teacher_steps` evenly spaced times, and after them the one that it reaches.

    ValueError if that is not below the student's first by as many timesteps.
    """
    first = int(student.timesteps[0])
    last = int(student.timesteps[1]) if settings.timestep is None else settings.timestep
    steps = settings.teacher_steps
    if last >= first:
        raise ValueError(
            f"diversity_anchor.timestep is {last}, but the student's first timestep is {first}, "
            f'from where the teacher leads down to it; set it below {first}, or to "none".'
        )
    if first - last < steps:
        raise ValueError(
            f"diversity_anchor.teacher_steps is {steps}, but from the student's first timestep "
            f"{first} to {last} there are {first - last}; set it to at most {first - last}."
        )
    return StepPlan(timesteps=tuple(first + (last - first) * i // steps for i in range(steps + 1)))


def anchor_target(teacher: Denoise, x: Tensor, schedule: NoiseSchedule, plan: StepPlan) -> Tensor:
    """The x0 with which ONE deterministic step from `x` lands where the teacher's steps do.

    `x`: where the student begins, from `initial_sample`, (B, C, H, W); `plan`: of `anchor_plan`.
    A DDIM step from (alpha, sigma) to (alpha', sigma') goes to
    z = alpha' x0 + sigma' (x - alpha x0) / sigma, so x0 = (sigma z - sigma' x) / (sigma alpha' -
    sigma' alpha); in `coefficient_dtype`, result in `x`'s dtype.
    """

    def fresh(_: int, like: Tensor) -> Tensor:
        raise AssertionError("a deterministic sampler asks for no noise")

    z = few_step_sample(
        teacher, x, schedule, plan, noise=fresh, strength=0.0, stop=len(plan.timesteps) - 1
    )
    alpha, sigma = coefficients(schedule, plan.times(plan.timesteps[0], x), x)
    alpha_z, sigma_z = coefficients(schedule, plan.times(plan.timesteps[-1], x), x)
    return ((sigma * z - sigma_z * x) / (sigma * alpha_z - sigma_z * alpha)).to(x.dtype)
