"""The one loop that turns noise into an image in a few steps, and the plan it follows.

Inference, backward simulation in training, validation and the nodes all call `few_step_sample`:
the student is trained on exactly what it is later asked to do (DMD2, arXiv 2405.14867, sec. 4.5).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .prediction import from_x0
from .schedule import NUM_TIMESTEPS, NoiseSchedule, add_noise, coefficient_dtype, coefficients

Timestep = int | float
"""int: step of a VP schedule, 0..999; float: EDM noise level (or k_sigma), or flow time."""
MAX_LEVEL = 1e6
"""Noise levels above this are mistakes: EDM's largest is 80, ComfyUI's at zero SNR 4518.8."""
Denoise = Callable[[Tensor, Tensor], Tensor]
"""(x_t: (B, C, H, W), t: (B,)) -> x0: (B, C, H, W)."""
Noise = Callable[[int, Tensor], Tensor]
"""(step index, like) -> unit Gaussian noise with `like`'s shape, dtype and device."""
Callback = Callable[[int, Tensor, Tensor], None]
"""(step index, x_t, x0_hat), called after each step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepPlan:
    """Which times the few-step loop visits, and where it starts."""

    timesteps: tuple[Timestep, ...]
    """Strictly descending. All int: steps of a VP model, 0..999. Otherwise: noise levels >= 0."""
    conditioning_timestep: Timestep | None = None
    """What the denoiser is told at the FIRST step (one-step SDXL: 399) although the input is pure
    noise; its alpha and sigma are the ones that convert. None: the first timestep."""
    start: int = 0
    """Index of the first step to run; later steps leave more of a given image (img2img)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(self.timesteps))
        if not self.timesteps:
            raise ValueError("timesteps is empty: give at least one, such as 999")
        for value in self.timesteps:
            self._check_value("timesteps", value)
        for earlier, later in zip(self.timesteps, self.timesteps[1:], strict=False):
            if not earlier > later:
                raise ValueError(
                    f"timesteps must descend, got {later} after {earlier}: "
                    "list them from the noisiest to the cleanest, each once"
                )
        if not isinstance(self.start, int) or not 0 <= self.start < len(self.timesteps):
            raise ValueError(
                f"start is {self.start!r} but the plan has {len(self.timesteps)} steps: "
                f"choose the index of one, 0..{len(self.timesteps) - 1}"
            )
        if self.conditioning_timestep is not None:
            self._check_value("conditioning_timestep", self.conditioning_timestep)
            if self.start > 0:
                raise ValueError(
                    f"conditioning_timestep {self.conditioning_timestep} belongs to pure noise, "
                    f"but start is {self.start}: leave one of them out"
                )
            following = self.timesteps[1:2]
            if following and not self.conditioning_timestep > following[0]:
                raise ValueError(
                    f"timesteps must descend, but the conditioning timestep "
                    f"{self.conditioning_timestep} comes before {following[0]}: use 1 step, or "
                    f"later timesteps below {self.conditioning_timestep}"
                )

    @classmethod
    def evenly(
        cls,
        num_steps: int,
        num_timesteps: int = NUM_TIMESTEPS,
        conditioning_timestep: int | None = None,
        start: int = 0,
    ) -> StepPlan:
        """`num_steps` steps, evenly from the last: 4 gives 999, 749, 499, 249 (as "simple")."""
        if not 1 <= num_steps <= num_timesteps:
            raise ValueError(f"num_steps is {num_steps}: choose 1..{num_timesteps}")
        return cls(
            timesteps=tuple(
                num_timesteps - 1 - i * num_timesteps // num_steps for i in range(num_steps)
            ),
            conditioning_timestep=conditioning_timestep,
            start=start,
        )

    @property
    def is_integer(self) -> bool:
        """Whether the times are steps of a VP schedule rather than noise levels."""
        return all(type(value) is int for value in self.timesteps)

    @property
    def active(self) -> tuple[Timestep, ...]:
        """The times that will be visited: `timesteps` from `start` on."""
        return self.timesteps[self.start :]

    def told(self, index: int) -> Timestep:
        """The time the denoiser is told at step `index`."""
        if index == 0 and self.conditioning_timestep is not None:
            return self.conditioning_timestep
        return self.timesteps[index]

    def times(self, value: Timestep, like: Tensor) -> Tensor:
        """`value` once per sample of `like`: (B,), int64 for a VP plan, else floating."""
        dtype = torch.int64 if self.is_integer else coefficient_dtype(like.device)
        return torch.full((like.shape[0],), value, dtype=dtype, device=like.device)

    def _check_value(self, field: str, value: Timestep) -> None:
        if self.is_integer:
            if type(value) is not int or not 0 <= value < NUM_TIMESTEPS:
                raise ValueError(
                    f"{field} has {value!r}, outside the integers 0..{NUM_TIMESTEPS - 1}: "
                    "choose steps the model was trained on, such as 999, 749, 499, 249"
                )
        elif not is_real(value) or not 0 <= value <= MAX_LEVEL:
            raise ValueError(
                f"{field} has {value!r}: give noise levels between 0 and {MAX_LEVEL:g}, "
                "or integer steps such as 999, 749, 499, 249"
            )


def initial_sample(
    schedule: NoiseSchedule, plan: StepPlan, eps: Tensor, x0: Tensor | None = None
) -> Tensor:
    """Where the loop begins.

    `eps`: (B, C, H, W), unit Gaussian; `x0`: the image to start from if `plan.start` > 0.
    From the first step: pure noise of x_t's total scale sqrt(alpha^2 + sigma^2), which is `eps`
    itself on VP schedules and at flow time 1, and ComfyUI's start in k-diffusion space. Later: the
    image, noised to the start. Computed in `coefficient_dtype`, result in `eps`'s dtype.
    """
    if plan.start == 0:
        alpha, sigma = coefficients(schedule, plan.times(plan.told(0), eps), eps)
        return ((alpha**2 + sigma**2).sqrt() * eps).to(eps.dtype)
    if x0 is None:
        raise ValueError(
            f"start is {plan.start} but there is no image: pass x0, or start at step 0"
        )
    return add_noise(schedule, x0.to(eps.dtype), eps, plan.times(plan.active[0], eps))


def few_step_sample(
    denoise: Denoise,
    x: Tensor,
    schedule: NoiseSchedule,
    plan: StepPlan,
    *,
    noise: Noise,
    strength: float | Sequence[float] = 1.0,
    stop: int | None = None,
    callback: Callback | None = None,
) -> Tensor:
    """Alternate x0_hat = denoise(x_t, t) and re-noising to the next time (arXiv 2405.14867, 4.4).

    `x`: (B, C, H, W), from `initial_sample`. Step indices are places in `plan.timesteps`;
    `noise(i, x)` is asked for the fresh noise that leads to step i, never for the first.

    `strength` s in [0, 1], one or one per re-injection (entry i - 1 leads to step i): the noise is
    s * fresh + sqrt(1 - s^2) * eps_hat, with eps_hat the noise that x_t and x0_hat imply. 1 is DMD2
    (eps_hat is not formed), 0 is deterministic DDIM (`noise` is not called).

    `stop` = k runs the steps before k only and returns x re-noised to step k, the student's input
    there in backward simulation (k = `plan.start`: `x` unchanged); None returns the last x0_hat.
    Re-noising is computed in `coefficient_dtype`, in between `x` has the dtype of x0_hat.
    """
    last = len(plan.timesteps) - 1
    strengths = check_strength(strength, num=last)
    if stop is not None and not plan.start <= stop <= last:
        raise ValueError(f"stop is {stop}: choose {plan.start}..{last}, or None to run to the end")
    for index in range(plan.start, len(plan.timesteps)):
        if index == stop:
            break
        t = plan.times(plan.told(index), x)
        x0_hat = denoise(x, t)
        if callback is not None:
            callback(index, x, x0_hat)
        if index == last:
            return x0_hat
        eps = _next_noise(schedule, x, x0_hat, t, noise, index + 1, strengths[index])
        x = add_noise(schedule, x0_hat, eps, plan.times(plan.timesteps[index + 1], x))
    return x


def _next_noise(
    schedule: NoiseSchedule,
    x_t: Tensor,
    x0_hat: Tensor,
    t: Tensor,
    noise: Noise,
    next_index: int,
    strength: float,
) -> Tensor:
    """strength * fresh + sqrt(1 - strength^2) * eps_hat: (B, C, H, W)."""
    if strength == 1.0:
        return noise(next_index, x_t)
    alpha, sigma = coefficients(schedule, t, x_t)
    implied = from_x0("epsilon", x0_hat.to(alpha.dtype), x_t, alpha, sigma)
    if strength == 0.0:
        return implied
    return strength * noise(next_index, x_t) + math.sqrt(1.0 - strength**2) * implied


def is_real(value: object) -> bool:
    """Whether `value` is an int or a float (a bool is an int to Python, not to us)."""
    return isinstance(value, float) or type(value) is int


def check_strength(strength: float | Sequence[float], *, num: int) -> tuple[float, ...]:
    """One strength per re-injection, of which there are `num`; ValueError outside [0, 1]."""
    if isinstance(strength, int | float):
        return check_strength((strength,), num=1) * num
    values = tuple(strength)
    if len(values) != num:
        raise ValueError(
            f"strength has {len(values)} values for {num} re-injections: "
            "give one number, or one per step after the first"
        )
    for value in values:
        if not is_real(value) or not 0.0 <= value <= 1.0:
            raise ValueError(
                f"strength is {value!r}: choose 0 (deterministic) to 1 (all noise fresh, DMD2)"
            )
    return values
