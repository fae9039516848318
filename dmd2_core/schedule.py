"""The forward process x_t = alpha_t * x0 + sigma_t * eps: its coefficients, in one place.

Three schedules: variance preserving steps (SDXL, SD1.5, with or without zero terminal SNR), EDM
noise levels and flow time. Coefficients are float64 on every device that has it (CPU, CUDA) and
float32 elsewhere (Apple's MPS), so an epsilon amplified 14.6 times at t = 999 loses nothing here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
"""Number of discrete steps that SDXL and SD1.5 were trained with: t runs from 0 to 999."""


class NoiseSchedule(Protocol):
    """The coefficients of the forward process as functions of the time t.

    `t` has any shape and, depending on the schedule, an integer or a floating dtype; results have
    the shape and device of `t` and the dtype `coefficient_dtype(t.device)`.
    """

    def alpha(self, t: Tensor) -> Tensor:
        """Scale of the clean signal at time `t`."""
        ...

    def sigma(self, t: Tensor) -> Tensor:
        """Scale of the unit Gaussian noise at time `t`."""
        ...


def coefficient_dtype(device: torch.device) -> torch.dtype:
    """float64 where the device computes in it, float32 elsewhere (MPS, XPU, DirectML)."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class VPSchedule:
    """Variance preserving: alpha_t = sqrt(abar_t), sigma_t = sqrt(1 - abar_t), integer t."""

    alphas_cumprod: Tensor
    """abar: (T,), strictly decreasing within [0, 1]; kept as float64 on the CPU."""

    def __post_init__(self) -> None:
        table = self.alphas_cumprod.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2:
            raise ValueError(
                f"alphas_cumprod must have shape (T,) with T >= 2, got {tuple(table.shape)}: "
                "pass the cumulative products of 1 - beta"
            )
        inside = bool(((table >= 0) & (table <= 1)).all())
        if not inside or bool((table.diff() >= 0).any()):
            raise ValueError(
                "alphas_cumprod must decrease strictly within [0, 1], got "
                f"{table[0].item():.6g} ... {table[-1].item():.6g}: pass cumprod(1 - beta), "
                "from the cleanest step to the noisiest"
            )
        object.__setattr__(self, "alphas_cumprod", table)

    @classmethod
    def scaled_linear(
        cls, beta_start: float, beta_end: float, num_timesteps: int = NUM_TIMESTEPS
    ) -> VPSchedule:
        """beta_t = (linear from sqrt(beta_start) to sqrt(beta_end))^2, as in latent diffusion."""
        root = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
        return cls(torch.cumprod(1.0 - root**2, dim=0))

    @classmethod
    def sdxl(cls) -> VPSchedule:
        """SDXL's 1000 steps: scaled linear betas from 0.00085 to 0.012."""
        return cls.scaled_linear(0.00085, 0.012)

    @classmethod
    def sd15(cls) -> VPSchedule:
        """SD1.5's 1000 steps: the same betas as SDXL's."""
        return cls.scaled_linear(0.00085, 0.012)

    def zero_terminal_snr(self) -> VPSchedule:
        """This schedule with alpha_999 = 0: pure noise at the last step (arXiv 2305.08891, alg. 1).

        sqrt(abar) is shifted to end at zero and scaled to start where it did.
        """
        root = self.alphas_cumprod.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        return VPSchedule(root**2)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether alpha is exactly zero at the last step, where only v, sample and flow work."""
        return self.alphas_cumprod[-1].item() == 0.0

    @property
    def num_timesteps(self) -> int:
        """T: valid times are 0 .. T - 1."""
        return len(self.alphas_cumprod)

    def alpha(self, t: Tensor) -> Tensor:
        """sqrt(abar_t); `t`: integers 0 .. T - 1, any shape."""
        return self._abar(t).sqrt()

    def sigma(self, t: Tensor) -> Tensor:
        """sqrt(1 - abar_t); `t`: integers 0 .. T - 1, any shape."""
        return (1.0 - self._abar(t)).sqrt()

    def k_sigma(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t, the noise-to-signal ratio; see the function `k_sigma`."""
        return k_sigma(self, t)

    def _abar(self, t: Tensor) -> Tensor:
        return _look_up(self.alphas_cumprod, t)


@dataclass(frozen=True, slots=True, kw_only=True)
class EDMSchedule:
    """alpha = 1 and the time IS the noise level sigma (arXiv 2206.00364).

    It is also the schedule of k-diffusion's and ComfyUI's sampling space x_t / alpha_t, where the
    times of a VP model are its `k_sigma`s.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise ValueError(
                f"sigma_min {self.sigma_min} and sigma_max {self.sigma_max} must satisfy "
                "0 < sigma_min < sigma_max: EDM's are 0.002 and 80"
            )

    def alpha(self, t: Tensor) -> Tensor:
        """1 for every `t` (noise levels, any shape)."""
        return torch.ones_like(t, dtype=coefficient_dtype(t.device))

    def sigma(self, t: Tensor) -> Tensor:
        """`t` itself."""
        return t.to(coefficient_dtype(t.device))

    def karras_levels(self, num: int = NUM_TIMESTEPS) -> Tensor:
        """`num` levels from sigma_max down to sigma_min: (num,), float64 (EDM, eq. 5)."""
        if num < 2:
            raise ValueError(f"num is {num}: ask for at least 2 noise levels")
        root = torch.linspace(
            self.sigma_max ** (1 / self.rho),
            self.sigma_min ** (1 / self.rho),
            num,
            dtype=torch.float64,
        )
        return root**self.rho


@dataclass(frozen=True, slots=True)
class FlowSchedule:
    """Rectified flow: alpha = 1 - t, sigma = t, t in [0, 1] (1 is pure noise)."""

    def alpha(self, t: Tensor) -> Tensor:
        """1 - t; `t` in [0, 1], any shape."""
        return 1.0 - t.to(coefficient_dtype(t.device))

    def sigma(self, t: Tensor) -> Tensor:
        """`t` itself."""
        return t.to(coefficient_dtype(t.device))


@dataclass(frozen=True, slots=True, eq=False)
class SteppedSchedule:
    """A continuous schedule as training steps: integers 0 .. T - 1, each standing for one time.

    So EDM and flow models are trained, and their few steps planned, in the same integers as VP
    models; only a network that takes the time itself looks it up (`time`).
    """

    base: EDMSchedule | FlowSchedule
    times: Tensor
    """(T,), strictly ascending: step 0 is the cleanest. Kept as float64 on the CPU."""

    def __post_init__(self) -> None:
        table = self.times.detach().to("cpu", torch.float64)
        if table.ndim != 1 or len(table) < 2 or bool((table.diff() <= 0).any()):
            raise ValueError(
                f"times must be at least 2 ascending numbers, got shape {tuple(table.shape)}: "
                "list them from the cleanest step to the noisiest"
            )
        object.__setattr__(self, "times", table)

    @classmethod
    def edm(cls, schedule: EDMSchedule | None = None) -> SteppedSchedule:
        """EDM's noise levels in Karras spacing: step 0 is sigma_min, step 999 is sigma_max."""
        schedule = schedule or EDMSchedule()
        return cls(schedule, schedule.karras_levels().flip(0))

    @classmethod
    def flow(cls) -> SteppedSchedule:
        """Flow times 0.001, 0.002, ..., 1: step 999 is pure noise."""
        steps = torch.arange(1, NUM_TIMESTEPS + 1, dtype=torch.float64)
        return cls(FlowSchedule(), steps / NUM_TIMESTEPS)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """False: that is said of VP models, some of which were rescaled to it; no other ever is."""
        return False

    @property
    def num_timesteps(self) -> int:
        """T: valid times are 0 .. T - 1."""
        return len(self.times)

    def time(self, t: Tensor) -> Tensor:
        """The base schedule's time (EDM: sigma) at steps `t`, integers of any shape."""
        return _look_up(self.times, t)

    def alpha(self, t: Tensor) -> Tensor:
        """The base schedule's alpha at steps `t`, integers of any shape."""
        return self.base.alpha(self.time(t))

    def sigma(self, t: Tensor) -> Tensor:
        """The base schedule's sigma at steps `t`, integers of any shape."""
        return self.base.sigma(self.time(t))


def _look_up(table: Tensor, steps: Tensor) -> Tensor:
    """table[steps] on the device of `steps`, in `coefficient_dtype`; `table`: (T,), on the CPU."""
    if steps.is_floating_point() or steps.is_complex() or steps.dtype == torch.bool:
        raise ValueError(f"timesteps are integers here, got dtype {steps.dtype}: use t.long()")
    index = steps.to("cpu", torch.int64)
    outside = index[(index < 0) | (index >= len(table))]
    if len(outside):
        raise ValueError(
            f"timestep {int(outside[0])} is outside 0..{len(table) - 1}: "
            "pick one the model was trained on"
        )
    return table[index].to(steps.device, coefficient_dtype(steps.device))


def coefficients(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t shaped to broadcast over `like`: (B, 1, 1, 1) for (B, C, H, W).

    `t`: (B,) or (); results on `like`'s device, in `coefficient_dtype` of that device.
    """
    if t.ndim > 1 or (t.ndim == 1 and len(t) not in (1, like.shape[0])):
        raise ValueError(
            f"t has shape {tuple(t.shape)} but the batch has {like.shape[0]} samples: "
            "pass one time per sample, shape (B,)"
        )
    shape = (-1,) + (1,) * (like.ndim - 1)
    dtype = coefficient_dtype(like.device)
    alpha, sigma = schedule.alpha(t).reshape(shape), schedule.sigma(t).reshape(shape)
    return alpha.to(like.device, dtype), sigma.to(like.device, dtype)


def add_noise(schedule: NoiseSchedule, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """The forward process: alpha_t * x0 + sigma_t * eps.

    `x0`, `eps`: (B, C, H, W); `t`: (B,). Computed in `coefficient_dtype`, result in `x0`'s dtype.
    """
    alpha, sigma = coefficients(schedule, t, x0)
    return (alpha * x0 + sigma * eps).to(x0.dtype)


def k_sigma(schedule: NoiseSchedule, t: Tensor) -> Tensor:
    """sigma_t / alpha_t, called sigma by k-diffusion and ComfyUI; shape of `t`.

    Infinite where alpha is zero. (ComfyUI uses 4518.8 for t = 999 of a zero-terminal-SNR model.)
    """
    return schedule.sigma(t) / schedule.alpha(t)
