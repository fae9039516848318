"""One run of DMD2 sampling through ComfyUI's own guider and sampler, from plan to latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
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
class BaseStart:
    """The first step is left to the model without the few-step LoRA, in several smaller ones.

    A distilled model settles the picture's layout in its first step, where its variety is lost; the
    base model has it still (arXiv 2503.10637).
    """

    model: Any
    num_steps: int

    def sigmas(self, plan: StepPlan) -> Tensor:
        """From the plan's first noise level down to its second: (num_steps + 1,)."""
        first, second = plan.active[:2]
        steps = (first - i * (first - second) / self.num_steps for i in range(self.num_steps))
        ways = StepPlan(timesteps=(*map(round, steps), second))
        return k_diffusion.sigmas_of(ways, self.model.get_model_object("model_sampling"))[:-1]


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
    base: BaseStart | None = None

    def remarks(self) -> list[str]:
        """What else than the plan decides the picture, in sentences."""
        found = []
        own = self.own_steps
        guided = [step for step in self.guided_steps if step in own]
        if self.base is not None:
            found.append(f"The base model makes step 1, in {_steps(self.base.num_steps)}.")
        if guided:
            numbers = ", ".join(map(str, guided))
            found.append(f"Guidance {self.guidance:g} on step{'s' * (len(guided) > 1)} {numbers}.")
        if self.negative is not None and self.nag_scale != 1.0 and len(guided) < len(own):
            found.append(f"The negative prompt acts in the attention, scale {self.nag_scale:g}.")
        elif self.negative is not None and not guided:
            found.append("The negative prompt does nothing: set nag_scale above 1.")
        passes = len(own) + len(guided) + (0 if self.base is None else self.base.num_steps)
        found.append(f"{passes} pass{'es' * (passes > 1)} of the network.")
        return found

    @property
    def own_steps(self) -> range:
        """Which of the steps that run, counted from 1, `model` itself makes."""
        return range(1 if self.base is None else 2, len(self.plan.active) + 1)


def base_start(model: Any, num_steps: int, plan: StepPlan) -> BaseStart:
    """ValueError if `model` cannot make the first step of `plan`."""
    if len(plan.active) < 2 or plan.conditioning_timestep is not None:
        raise ValueError(
            "base_model makes the first step, but there is only one: disconnect it, or use a "
            "LoRA of several steps (and a higher denoise)"
        )
    if recipe_for(model, None) is not None:
        raise ValueError(
            "base_model carries a few-step LoRA itself: connect the model as it is before that LoRA"
        )
    k_diffusion.check_discrete(model.get_model_object("model_sampling"))
    return BaseStart(model=model, num_steps=num_steps)


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
        "No recipe and no LoRA: right for a checkpoint with a 4-step LoRA merged into it. An "
        "ordinary checkpoint gives a blurred picture: add DMD2 Load LoRA."
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
    levels = sigmas.tolist()
    num_base_steps = 0 if run.base is None else run.base.num_steps
    report = _Report(run.model, num_base_steps + len(run.own_steps))
    function = k_diffusion.sample_dmd2
    if run.base is not None:
        guider = FewStepGuider(run.base.model, run.positive, None)
        ddim = KSAMPLER(function, {"strength": DDIM})
        ways = run.base.sigmas(run.plan)
        start = _sampled(run, guider, noise, samples, ddim, ways, report.after(0))
        function = _from(run.base.model.model.process_latent_in(start))
        sigmas = sigmas[1:]
    guider = FewStepGuider(
        run.model,
        run.positive,
        run.negative,
        guidance=run.guidance,
        guided_levels=[levels[step - 1] for step in run.guided_steps],
        nag_scale=run.nag_scale,
    )
    solver = KSAMPLER(function, {"strength": run.strength, "noise_source": run.noise})
    result = _sampled(run, guider, noise, samples, solver, sigmas, report.after(num_base_steps))
    latent = {key: value for key, value in run.latent.items() if key not in DOWNSCALE_MARKS}
    return latent | {"samples": result.to(comfy.model_management.intermediate_device())}


def _sampled(
    run: Run,
    guider: FewStepGuider,
    noise: Tensor,
    samples: Tensor,
    solver: KSAMPLER,
    sigmas: Tensor,
    callback: Callback,
) -> Tensor:
    """One pass of ComfyUI's sampling over `sigmas`: (B, 4, H/8, W/8) in the latent's scale."""
    return guider.sample(
        noise,
        samples,
        solver,
        sigmas,
        denoise_mask=run.latent.get("noise_mask"),
        callback=callback,
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=run.noise.seed,
    )


def _from(start: Tensor) -> Callable[..., Tensor]:
    """The sampler function that goes on from `start`, (B, 4, H/8, W/8) at the first noise level.

    ComfyUI's own way, a noised latent as the image, would show that latent through a mask.
    """

    def sample_from_start(model: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        return k_diffusion.sample_dmd2(model, start.to(x), *arguments, **options)

    return sample_from_start


class _Report:
    """Previews and progress over passes that count their steps from 0 each."""

    def __init__(self, model: Any, num_steps: int) -> None:
        self.num_steps = num_steps
        self.callback = latent_preview.prepare_callback(model, num_steps)

    def after(self, num_done: int) -> Callback:
        def report(step: int, x0: Tensor, x: Tensor, _: int) -> None:
            self.callback(num_done + step, x0, x, self.num_steps)

        return report


def _steps(num: int) -> str:
    return f"{num} step{'s' * (num != 1)}"
