"""The node that makes ComfyUI's own sampling nodes run a few-step model as it was trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io
from torch import Tensor

from ..dmd2_core import Recipe
from . import k_diffusion, settings
from .common import CATEGORY, recipe_input, search_aliases
from .recipes import check_fits, recipe_for
from .scheduler import MAX_STEPS

WRAPPER_KEY = "dmd2_trained_steps"


class KSamplerPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_KSamplerPatch",
            display_name="DMD2 for KSampler",
            category=CATEGORY,
            **search_aliases("few step ksampler", "lcm", "simple scheduler", "timesteps"),
            description="Keeps your KSampler: the model that comes out is sampled at its trained "
            "timesteps and at its own cfg, whatever scheduler, steps, denoise and cfg are set.",
            inputs=[
                io.Model.Input("model", tooltip="A model with a few-step LoRA."),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MAX_STEPS,
                    tooltip="Number of evenly spaced steps to run. 0: as the recipe says, or 4 "
                    "without one. KSampler's own number counts no longer.",
                ),
                recipe_input("the steps, the conditioning timestep and the cfg"),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For KSampler, with any scheduler. Sampler: lcm for DMD2 and LCM, "
                    "euler for SDXL-Lightning and Hyper-SD.",
                ),
                io.String.Output(
                    display_name="plan", tooltip="The timesteps in words, for Preview as Text."
                ),
            ],
        )

    @classmethod
    def execute(cls, model: Any, steps: int, recipe: Recipe | None = None) -> io.NodeOutput:
        sampling = model.get_model_object("model_sampling")
        k_diffusion.check_discrete(sampling)
        connected, recipe = recipe, recipe_for(model, recipe) if steps == 0 else None
        check_fits(recipe, sampling)
        patched = model.clone()
        told = k_diffusion.conditioning_timestep_of(sampling)
        wanted = None if recipe is None else settings.recipes_conditioning(recipe)
        if told is None and wanted is not None:
            told, sampling = wanted, k_diffusion.truncated(sampling, wanted)
            patched.add_object_patch("model_sampling", sampling)
        plan = settings.step_plan(
            recipe=recipe, steps=steps, timesteps="", denoise=1.0, conditioning_timestep=told
        )
        trained = k_diffusion.sigmas_of(plan, sampling)
        cfg = 1.0 if recipe is None else recipe.guidance
        wrapper = on_trained_steps(trained, sampling, cfg)
        patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, WRAPPER_KEY, wrapper)
        text = settings.describe_plan(plan, 1.0, connected or recipe)
        return io.NodeOutput(patched, text, ui={"text": (text,)})


def on_trained_steps(trained: Tensor, model_sampling: Any, cfg: float) -> Callable[..., Any]:
    """A wrapper around ComfyUI's sampling that moves it to the `trained` noise levels and `cfg`.

    `trained`: (steps + 1,), descending to 0. Levels are replaced only here: all else that sampling
    needs (masks, hooks, previews) goes on as it is.
    """

    def wrapper(
        executor: Any,
        noise: Tensor,
        latent: Tensor,
        sampler: Any,
        sigmas: Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        guider = executor.class_obj
        before, guider.cfg = guider.cfg, cfg
        try:
            moved = k_diffusion.moved_to(trained, sigmas, model_sampling)
            return executor(noise, latent, sampler, moved, *rest, **named)
        finally:
            guider.cfg = before

    return wrapper
