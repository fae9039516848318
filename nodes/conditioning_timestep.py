"""The node that lets a one-step model start from pure noise at its conditioning timestep."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import k_diffusion, settings
from .common import CATEGORY, recipe_input, search_aliases
from .recipes import check_fits, recipe_for


class ConditioningTimestep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_ConditioningTimestep",
            display_name="DMD2 Conditioning Timestep",
            category=CATEGORY,
            **search_aliases("one step", "1 step", "399", "model sampling"),
            description="For one-step models: pure noise goes in, but the network is told an "
            "earlier timestep (SDXL: 399). Works with any sampler and an empty latent.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="A model with a one-step LoRA, or a one-step checkpoint."
                ),
                io.Int.Input(
                    "timestep",
                    default=settings.DEFAULT_CONDITIONING_TIMESTEP,
                    min=0,
                    max=k_diffusion.NUM_TIMESTEPS - 1,
                    tooltip="What the network is told at the first step. SDXL's one-step models "
                    "were trained with 399.",
                ),
                recipe_input("the timestep (or leaves the model as it is if it has none)"),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="For the scheduler AND the sampling node: both must get this model.",
                )
            ],
        )

    @classmethod
    def execute(cls, model: Any, timestep: int, recipe: Recipe | None = None) -> io.NodeOutput:
        sampling = model.get_model_object("model_sampling")
        if timestep == settings.DEFAULT_CONDITIONING_TIMESTEP:
            recipe = recipe_for(model, recipe)
            check_fits(recipe, sampling)
        wanted = settings.conditioning_timestep(recipe, timestep)
        if wanted is None:
            return io.NodeOutput(model)
        patched = model.clone()
        patched.add_object_patch("model_sampling", k_diffusion.truncated(sampling, wanted))
        return io.NodeOutput(patched)
