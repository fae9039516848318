"""The node that gives the exact noise levels of the steps a DMD2 model was trained on."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import k_diffusion, settings
from .common import CATEGORY, recipe_input


class Scheduler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_Scheduler",
            display_name="DMD2 Scheduler",
            category=CATEGORY,
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
                    max=k_diffusion.NUM_TIMESTEPS,
                    tooltip="Number of evenly spaced steps. 0: as the recipe says, or 4 without "
                    "one. Distilled models work best with the number they were trained for.",
                ),
                io.String.Input(
                    "timesteps",
                    default="",
                    tooltip="A list of timesteps instead of a number, noisiest first, such "
                    "as 999, 749, 499, 249. Empty: evenly spaced, or as the recipe says.",
                ),
                io.Int.Input(
                    "start_step",
                    default=0,
                    min=0,
                    max=k_diffusion.NUM_TIMESTEPS - 1,
                    tooltip="The first step to run. 0: text to image. 1 or more: image to image "
                    "that starts at a trained step; higher keeps more of the image.",
                ),
                recipe_input("the steps"),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas", tooltip="For SamplerCustom or SamplerCustomAdvanced."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        steps: int,
        timesteps: str,
        start_step: int,
        recipe: Recipe | None = None,
    ) -> io.NodeOutput:
        sampling = model.get_model_object("model_sampling")
        k_diffusion.check_discrete(sampling)
        plan = settings.step_plan(
            recipe=recipe,
            steps=steps,
            timesteps=timesteps,
            start_step=start_step,
            conditioning_timestep=k_diffusion.conditioning_timestep_of(sampling),
        )
        return io.NodeOutput(k_diffusion.sigmas_of(plan, sampling))
