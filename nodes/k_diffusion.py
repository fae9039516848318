"""Where dmd2_core meets ComfyUI: its k-diffusion space, its sigma table, its sampler functions.

ComfyUI samples x / alpha_t, so its "sigma" is dmd2_core's `k_sigma` and its space is EDMSchedule's:
alpha = 1 and the time is the noise level. Nothing else in the pack knows about this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_sampling
import torch
from comfy.k_diffusion.sampling import default_noise_sampler
from torch import Tensor
from tqdm import tqdm

from ..dmd2_core import EDMSchedule, Prediction, SeededNoise, StepPlan, few_step_sample

NUM_TIMESTEPS = 1000
PER_IMAGE, STOCK = "per image", "stock"
NOISE_SOURCES = (PER_IMAGE, STOCK)
Noise = Callable[[int, Tensor], Tensor]
"""(step, like) -> unit Gaussian noise with `like`'s shape (B, C, H, W), dtype and device."""
FLOW_REMEDY = (
    "DMD2's sampling nodes are for models that predict epsilon or v: pass an SDXL or SD1.5 model "
    "of flow through ModelSamplingSD3 with shift 1, and sample with ComfyUI's own KSampler: "
    "sampler lcm, scheduler simple, cfg 1, and the LoRA's number of steps."
)
_TRUNCATED = "dmd2_conditioning_timestep"
_UNCUT_SIGMA_MAX = "dmd2_uncut_sigma_max"
_ZERO_SNR_SIGMA = 1000.0
"""A k_sigma at t = 999 above this means zero terminal SNR (ComfyUI: 4518.8, otherwise 14.6)."""


def check_discrete(model_sampling: Any) -> None:
    """ValueError unless the model has the 1000 discrete steps of SDXL and SD1.5."""
    check_noise_to_signal(model_sampling)
    table = getattr(model_sampling, "sigmas", ())
    is_discrete = isinstance(model_sampling, comfy.model_sampling.ModelSamplingDiscrete)
    if not is_discrete or (
        len(table) != NUM_TIMESTEPS and conditioning_timestep_of(model_sampling) is None
    ):
        raise ValueError(
            f"the model's schedule is {_kind(model_sampling)} with {len(table)} noise levels, not "
            f"SDXL's or SD1.5's {NUM_TIMESTEPS} steps: connect such a model, and remove nodes that "
            "replace its schedule (ModelSamplingDiscrete 'lcm', ModelSamplingContinuousEDM)"
        )


def check_noise_to_signal(model_sampling: Any) -> None:
    """ValueError for a flow-matching model, whose x_t is not x0 + sigma * eps."""
    if isinstance(model_sampling, comfy.model_sampling.CONST):
        raise ValueError(
            f"the model is a flow-matching model ({_kind(model_sampling)}), which DMD2's nodes do "
            f"not sample. {FLOW_REMEDY}"
        )


def _kind(model_sampling: Any) -> str:
    """The names of the classes that a ComfyUI model_sampling is made of."""
    cls = type(model_sampling)
    if conditioning_timestep_of(model_sampling) is not None:
        cls = cls.__bases__[0]  # ours is of one that ComfyUI made
    bases = [base.__name__ for base in cls.__bases__ if base is not torch.nn.Module]
    return " + ".join(bases) or cls.__name__


def prediction_of(model_sampling: Any) -> Prediction | None:
    """What the network predicts, None where it is neither epsilon nor v."""
    if isinstance(model_sampling, comfy.model_sampling.V_PREDICTION):
        return "v"
    if isinstance(model_sampling, comfy.model_sampling.X0):
        return None
    return "epsilon" if isinstance(model_sampling, comfy.model_sampling.EPS) else None


def has_zero_snr(model_sampling: Any) -> bool:
    """Whether the schedule ends in pure noise; a truncated one is judged by its whole."""
    before = getattr(model_sampling, _UNCUT_SIGMA_MAX, None)
    sigma_max = getattr(model_sampling, "sigma_max", 0.0) if before is None else before
    return float(sigma_max) > _ZERO_SNR_SIGMA


def conditioning_timestep_of(model_sampling: Any) -> int | None:
    """The timestep that `truncated` cut the schedule at, None for an uncut schedule."""
    return getattr(model_sampling, _TRUNCATED, None)


def truncated(model_sampling: Any, timestep: int) -> Any:
    """A copy of `model_sampling` that ends at `timestep`, for a one-step student.

    Its sigma_max is k_sigma(timestep), so ComfyUI scales pure noise exactly to it, the network
    sees the noise with variance one and is told `timestep`, and that timestep's alpha and sigma
    convert its output. Being a copy it keeps v-prediction, zero terminal SNR and earlier patches.
    """
    check_discrete(model_sampling)
    last = len(model_sampling.sigmas) - 1
    if not 0 <= timestep <= last:
        raise ValueError(
            f"timestep is {timestep}, but the model's schedule has 0..{last}: choose one of these "
            "(399 is SDXL's), and use one DMD2 Conditioning Timestep node only"
        )
    cut = copy.deepcopy(model_sampling)
    cut.__class__ = _from_pure_noise(type(model_sampling))
    cut.set_sigmas(model_sampling.sigmas[: timestep + 1].clone())
    setattr(cut, _TRUNCATED, timestep)
    if not hasattr(cut, _UNCUT_SIGMA_MAX):
        setattr(cut, _UNCUT_SIGMA_MAX, float(model_sampling.sigma_max))
    return cut


def _from_pure_noise(kind: type) -> type:
    """`kind` with a `noise_scaling` that refuses an image at its first step.

    Every sampler of ComfyUI scales its start there, so the message comes whatever node samples.
    """

    class FromPureNoise(kind):  # type: ignore[misc, valid-type]
        def noise_scaling(
            self, sigma: Tensor, noise: Tensor, latent_image: Tensor, max_denoise: bool = False
        ) -> Tensor:
            if max_denoise and noise.any() and latent_image.any():
                raise ValueError(
                    "the latent is not empty, but a model with a conditioning timestep makes its "
                    "picture from pure noise alone: connect an Empty Latent Image, or use a model "
                    "of several steps for image to image and inpainting"
                )
            return super().noise_scaling(sigma, noise, latent_image, max_denoise)

    FromPureNoise.__name__ = kind.__name__
    return FromPureNoise


def sigmas_of(plan: StepPlan, model_sampling: Any) -> Tensor:
    """The plan's noise levels as ComfyUI's SIGMAS: (steps + 1,), float32 on the CPU, 0 at the end.

    Taken from the model's own table, so the network is told exactly the plan's timesteps.
    """
    check_discrete(model_sampling)
    steps = [plan.told(index) for index in range(plan.start, len(plan.timesteps))]
    outside = [step for step in steps if step >= len(model_sampling.sigmas)]
    if outside:
        raise ValueError(
            f"timestep {outside[0]} is beyond the model's conditioning timestep "
            f"{conditioning_timestep_of(model_sampling)}: choose lower timesteps, or remove DMD2 "
            "Conditioning Timestep"
        )
    table = model_sampling.sigmas.detach().to("cpu", torch.float32)
    return torch.cat([table[torch.tensor(steps)], torch.zeros(1)])


def moved_to(trained: Tensor, sigmas: Tensor, model_sampling: Any) -> Tensor:
    """The part of the `trained` noise levels that `sigmas` covers, nearest in the timestep.

    Both are (steps + 1,) and descend, `trained` to 0. A `sigmas` that ends above 0 (the first of
    two passes) ends at the trained level where the second will start.
    """
    if len(sigmas) == 0:
        return sigmas
    steps = model_sampling.timestep(trained[:-1]).double()

    def nearest(sigma: Tensor) -> int:
        step = model_sampling.timestep(sigma.to(trained).reshape(1)).double()
        return int((steps - step).abs().argmin())

    stop = len(trained) if sigmas[-1] == 0 else nearest(sigmas[-1]) + 1
    return trained[nearest(sigmas[0]) : stop].to(sigmas)


def sample_dmd2(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    strength: float | Sequence[float] = 1.0,
    noise_source: str | Noise = PER_IMAGE,
    seed: int | None = None,
) -> Tensor:
    """ComfyUI's sampler function: dmd2_core's one loop over the given sigmas.

    `model(x, sigma, **extra_args)` returns x0; `x`: (B, C, H, W), already noised to sigmas[0] by
    ComfyUI; `sigmas`: (steps + 1,), descending. A last sigma above 0 (split schedules) returns x at
    that noise level. `seed` is that of the fresh noise; None: the sampling node's (`extra_args`);
    a `noise_source` of one's own has no use for it.
    """
    levels = sigmas.tolist()
    if len(levels) < 2:
        return x
    check_noise_to_signal(model.inner_model.inner_model.model_sampling)
    is_complete = levels[-1] == 0.0
    plan = StepPlan(timesteps=tuple(levels[:-1] if is_complete else levels))
    extra_args = extra_args or {}
    if seed is None:
        seed = extra_args.get("seed") or 0

    with tqdm(total=len(levels) - 1, disable=disable) as progress:

        def denoise(x_t: Tensor, t: Tensor) -> Tensor:
            return model(x_t, t.to(sigmas.dtype), **extra_args)

        def report(index: int, x_t: Tensor, x0_hat: Tensor) -> None:
            progress.update()
            if callback is not None:
                sigma = sigmas[index]
                step = {"i": index, "x": x_t, "sigma": sigma, "sigma_hat": sigma}
                callback(step | {"denoised": x0_hat})

        return few_step_sample(
            denoise,
            x,
            EDMSchedule(),
            plan,
            noise=noise_source if callable(noise_source) else noise_for(x, seed, noise_source),
            strength=_last(strength, num=len(plan.timesteps) - 1),
            stop=None if is_complete else len(levels) - 1,
            callback=report,
        )


def noise_for(x: Tensor, seed: int, source: str) -> Noise:
    """The fresh noise per step: dmd2_core's per image, or ComfyUI's own whole-batch draw.

    "stock" draws in ComfyUI's order from ComfyUI's generator, so that the same seed gives what its
    `lcm` sampler gives; image i then depends on the batch size and the device.
    """
    if source == PER_IMAGE:
        return SeededNoise(seed)
    if source == STOCK:
        draw = default_noise_sampler(x, seed=seed % 2**64)
        return lambda step, like: draw(None, None)
    raise ValueError(f"noise is {source!r}: choose one of {', '.join(NOISE_SOURCES)}")


def _last(strength: float | Sequence[float], *, num: int) -> float | Sequence[float]:
    """The last `num` of a recipe's strengths: what is left of them when sampling starts later."""
    if isinstance(strength, int | float) or len(strength) < num:
        return strength
    return strength[len(strength) - num :]
