"""One run of DMD2 sampling through ComfyUI's own guider and sampler, from plan to latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import torch
from comfy.samplers import KSAMPLER
from torch import Tensor

from ..dmd2_core import Recipe, StepPlan
from . import k_diffusion, settings
from .guider import Conditioning, FewStepGuider
from .image_noise import ImageNoise
from .recipes import check_fits, recipe_for

DDIM = 0.0
"""The noise strength at which the loop is deterministic, as undistilled models are sampled."""
Callback = Callable[[int, Tensor, Tensor, int], None]
"""(step, x0, x, num_steps), as ComfyUI's previews want it."""
DOWNSCALE_MARKS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
"""What ComfyUI writes on empty latents; a sampled one has them no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Everything that decides the result."""

    model: Any
    plan: StepPlan
    positive: Conditioning
    negative: Conditioning | None = None
    latent: Mapping[str, Any]
    """ComfyUI's: samples (B, 4, H/8, W/8) and perhaps noise_mask, batch_index, ..."""
    noise: ImageNoise
    strength: float | Sequence[float] = 1.0
    guidance: float = 1.0
    guided_steps: tuple[int, ...] = ()
    """Which of the steps that run, counted from 1, have `guidance`."""
    nag_scale: float = 1.0
    base: Any = None
    """The model without the few-step LoRA: it makes the first step, if given. A distilled model
    settles the layout there and loses its variety, which the base still has (arXiv 2503.10637)."""

    def remarks(self) -> list[str]:
        """What else than the plan decides the picture, in sentences."""
        found = []
        num_steps, num_guided = len(self.plan.active), len(self.guided_steps)
        if self.base is not None:
            found.append("The base model makes step 1.")
        if self.guided_steps:
            numbers = ", ".join(map(str, self.guided_steps))
            found.append(f"Guidance {self.guidance:g} on step{'s' * (num_guided > 1)} {numbers}.")
        if self.negative is not None and self.nag_scale != 1.0 and num_guided < num_steps:
            found.append(f"The negative prompt acts in the attention, scale {self.nag_scale:g}.")
        elif self.negative is not None and not self.guided_steps:
            found.append("The negative prompt does nothing: set nag_scale above 1.")
        passes = num_steps + num_guided
        found.append(f"{passes} pass{'es' * (passes > 1)} of the network.")
        return found


def check_base(base: Any, model: Any, plan: StepPlan) -> None:
    """ValueError if `base` cannot make the first step of `model`'s `plan`."""
    if len(plan.active) < 2 or plan.conditioning_timestep is not None:
        raise ValueError(
            "base_model makes the first step, but there is only one: disconnect it, or use a "
            "LoRA of several steps (and a higher denoise)"
        )
    if recipe_for(base, None) is not None:
        raise ValueError(
            "base_model carries a few-step LoRA itself: connect the model as it is before that LoRA"
        )
    schedules = [
        k_diffusion.sigmas_of(plan, which.get_model_object("model_sampling"))
        for which in (base, model)
    ]
    if not torch.allclose(*schedules, rtol=1e-3):
        raise ValueError(
            "base_model has another noise schedule than model: connect the model that the LoRA is "
            "applied to, with the same nodes that change its sampling"
        )


def guidance_of(recipe: Recipe | None, plan: StepPlan) -> tuple[float, tuple[int, ...]]:
    """The recipe's own guidance, on all steps; DMD2's is 1, none."""
    if recipe is None or recipe.guidance <= 1.0:
        return 1.0, ()
    return recipe.guidance, tuple(range(1, len(plan.active) + 1))


def noise_strength(recipe: Recipe | None, plan: StepPlan) -> float | Sequence[float]:
    """The recipe's share of fresh noise, where it goes with the number of steps."""
    if recipe is None:
        return settings.DEFAULT_STRENGTH
    fits = isinstance(recipe.strength, float | int) or len(plan.timesteps) == len(recipe.timesteps)
    return recipe.strength if fits else settings.DEFAULT_STRENGTH


def note_without_recipe(model: Any) -> str:
    """What to think of when neither the connection nor the model has a recipe."""
    if model.patches:
        return (
            "No recipe: these are DMD2's usual steps. For another kind of LoRA choose its family "
            "in DMD2 Load LoRA."
        )
    return (
        "No recipe and no LoRA: right for a checkpoint with a 4-step LoRA merged into it (DMD2 "
        "Merge Check reads the recipe of one that dmd2 merge made). An ordinary checkpoint gives a "
        "blurred picture: add DMD2 Load LoRA."
    )


def prepared(model: Any, recipe: Recipe | None, steps: int, denoise: float) -> tuple[Any, StepPlan]:
    """The model to sample and its plan; a one-step model is given its conditioning timestep.

    `steps`: 0 is the recipe's number, or 4 without one; the recipe's number means its timesteps.
    """
    sampling = model.get_model_object("model_sampling")
    k_diffusion.check_discrete(sampling)
    check_fits(recipe, sampling)
    told = k_diffusion.conditioning_timestep_of(sampling)
    if recipe is not None and steps in (0, len(recipe.timesteps)):
        steps = 0
        wanted = settings.conditioning_timestep(recipe, settings.DEFAULT_CONDITIONING_TIMESTEP)
        if wanted is not None and told is None:
            told, model = wanted, model.clone()
            model.add_object_patch("model_sampling", k_diffusion.truncated(sampling, wanted))
    plan = settings.step_plan(
        recipe=recipe, steps=steps, timesteps="", denoise=denoise, conditioning_timestep=told
    )
    return model, plan


def sample(run: Run) -> dict[str, Any]:
    """ComfyUI's latent with the result; masks, previews, progress and interrupts as ever."""
    samples = comfy.sample.fix_empty_latent_channels(run.model, run.latent["samples"])
    noise = run.noise.first(samples)
    sigmas = k_diffusion.sigmas_of(run.plan, run.model.get_model_object("model_sampling"))
    num_steps = len(sigmas) - 1
    show = latent_preview.prepare_callback(run.model, num_steps)
    common = {
        "denoise_mask": run.latent.get("noise_mask"),
        "disable_pbar": not comfy.utils.PROGRESS_BAR_ENABLED,
        "seed": run.noise.seed,
    }
    function, ahead, num_done = k_diffusion.sample_dmd2, sigmas, 0
    if run.base is not None:
        ddim = KSAMPLER(function, {"strength": DDIM})
        guider = _guider(run, run.base, sigmas)
        report = _counted_from(0, num_steps, show)
        first = guider.sample(noise, samples, ddim, sigmas[:2], callback=report, **common)
        function = _from(run.base.model.process_latent_in(first))
        ahead, num_done = sigmas[1:], 1
    solver = KSAMPLER(function, {"strength": run.strength, "noise_source": run.noise})
    guider = _guider(run, run.model, sigmas)
    report = _counted_from(num_done, num_steps, show)
    result = guider.sample(noise, samples, solver, ahead, callback=report, **common)
    latent = {key: value for key, value in run.latent.items() if key not in DOWNSCALE_MARKS}
    return latent | {"samples": result.to(comfy.model_management.intermediate_device())}


def _guider(run: Run, model: Any, sigmas: Tensor) -> FewStepGuider:
    """For a part of the plan whose noise levels are `sigmas`: (steps + 1,)."""
    return FewStepGuider(
        model,
        run.positive,
        run.negative,
        guidance=run.guidance,
        guided_levels=[float(sigmas[step - 1]) for step in run.guided_steps],
        nag_scale=run.nag_scale,
    )


def _from(start: Tensor) -> Callable[..., Tensor]:
    """The sampler function that goes on from `start`, (B, 4, H/8, W/8) at the first noise level.

    ComfyUI's own way, a noised latent as the image, would show that latent through a mask.
    """

    def sample_from_start(model: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return k_diffusion.sample_dmd2(model, start.to(x), *arguments, **options)

    return sample_from_start


def _counted_from(num_done: int, num_steps: int, callback: Callback) -> Callback:
    """`callback` for a pass that comes after `num_done` steps of `num_steps`."""

    def report(step: int, x0: Tensor, x: Tensor, _: int) -> None:
        callback(num_done + step, x0, x, num_steps)

    return report
