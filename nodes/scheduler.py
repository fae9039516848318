"""The node that gives the exact noise levels of the steps a DMD2 model was trained on."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import k_diffusion, settings
from .common import CATEGORY, recipe_input, search_aliases
from .plan_view import plan_ui
from .recipes import check_fits, recipe_for

MAX_STEPS = 16


class Scheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_Scheduler",
            display_name="DMD2 Scheduler",
            category=CATEGORY,
            **search_aliases("few step scheduler", "timesteps", "sigmas", "lcm scheduler"),
            description="The sigmas of exactly the timesteps a distilled model was trained on, "
            "such as 999, 749, 499, 249 for 4 steps.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model that is sampled, after DMD2 Conditioning Timestep if used.",
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=MAX_STEPS,
                    tooltip="Number of evenly spaced steps. 0: as the recipe says, or 4 without "
                    "one. Distilled models work best with the number they were trained for.",
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    tooltip="A list of timesteps instead of a number, noisiest first, such "
                    "as 999, 749, 499, 249. Empty: evenly spaced, or as the recipe says.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1: text to image. Less: image to image, which starts at the trained "
                    "timestep nearest to this amount; less keeps more of the image.",
                ),
                recipe_input("the steps"),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas", tooltip="For SamplerCustom or SamplerCustomAdvanced."
                ),
                io.String.Output(
                    display_name="plan", tooltip="The timesteps in words, for Preview as Text."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        steps: int,
        timesteps: str,
        denoise: float,
        recipe: Recipe | None = None,
    ) -> io.NodeOutput:
        sampling = model.get_model_object("model_sampling")
        k_diffusion.check_discrete(sampling)
        if denoise == 0:
            nothing = "Denoise 0: no step runs, the image stays."
            return io.NodeOutput(torch.zeros(0), nothing, ui={"text": (nothing,)})
        set_by_hand = steps != 0 or timesteps.strip() != ""
        if not set_by_hand:
            recipe = recipe_for(model, recipe)
            check_fits(recipe, sampling)
        plan = settings.step_plan(
            recipe=recipe,
            steps=steps,
            timesteps=timesteps,
            denoise=denoise,
            conditioning_timestep=k_diffusion.conditioning_timestep_of(sampling),
        )
        sigmas = k_diffusion.sigmas_of(plan, sampling)
        text = settings.describe_plan(plan, denoise, recipe)
        return io.NodeOutput(sigmas, text, ui=plan_ui(text, plan, sampling))
