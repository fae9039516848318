"""The options of [sampling] and [backward_simulation]: the student's steps and their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .config_section import NUM_TIMESTEPS, Section, number, show_value


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig(Section):
    section: ClassVar[str] = "sampling"

    steps: int = number(4, low=1, high=100)
    """Number of evenly spaced sampling steps; 4 means timesteps 999, 749, 499, 249."""

    timesteps: tuple[int, ...] = number((), low=1, high=NUM_TIMESTEPS - 1)
    """An explicit, descending list of timesteps in place of `steps`; empty: use `steps`. Not 0:
    there is nothing left to denoise there."""

    conditioning_timestep: int | None = number(None, low=1, high=NUM_TIMESTEPS - 1)
    """Timestep that the network is told at the first step (399 for one-step SDXL); "none": the
    true one."""

    random_steps: tuple[int, int] | None = number(None, low=1, high=100)
    """The fewest and the most steps of a LoRA that serves all numbers between, such as [2, 8]: each
    iteration draws a number, and places near the evenly spaced ones. `steps` is then the number
    for validation, and the one that the file names. "none": always the same steps."""

    def __post_init__(self) -> None:
        Section.__post_init__(self)
        pairs = zip(self.timesteps, self.timesteps[1:], strict=False)
        if any(later >= earlier for earlier, later in pairs):
            ordered = sorted(set(self.timesteps), reverse=True)
            raise ValueError(
                f"sampling.timesteps is {show_value(self.timesteps)}; its numbers must descend, "
                f"such as {ordered}."
            )
        if self.random_steps is not None:
            self._check_random_steps(*self.random_steps)
        steps = len(self.timesteps) or self.steps
        if self.conditioning_timestep is not None and steps > 1:
            key = "timesteps" if self.timesteps else "steps"
            raise ValueError(
                f"sampling.conditioning_timestep is {self.conditioning_timestep}, which belongs to "
                f"one-step students, but sampling.{key} is {show_value(getattr(self, key))}; set "
                'sampling.steps to 1, or sampling.conditioning_timestep to "none".'
            )

    def _check_random_steps(self, fewest: int, most: int) -> None:
        told = f"sampling.random_steps is {show_value(self.random_steps)}"
        if not fewest <= most or most == 1:
            raise ValueError(
                f"{told}; set it to the fewest and the most steps, such as [2, 8], or "
                'to "none" for always the same steps.'
            )
        for key in ("timesteps", "conditioning_timestep"):
            value = getattr(self, key)
            if value:
                raise ValueError(
                    f"{told}, which places the steps anew in each iteration, but sampling.{key} is "
                    f"{show_value(value)}; remove one of them."
                )
        if not fewest <= self.steps <= most:
            raise ValueError(
                f"{told}, but sampling.steps, the number for validation and for the file, is "
                f"{self.steps}; set it to one of {fewest} to {most}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BackwardSimulationConfig(Section):
    section: ClassVar[str] = "backward_simulation"

    enabled: bool = True
    """Whether the student trains on what its own earlier steps made, or on noised real images."""
