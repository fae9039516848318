"""The node that gives ComfyUI's sampling nodes the few-step loop of DMD2."""

from __future__ import annotations

from comfy.samplers import KSAMPLER
from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import settings
from .common import CATEGORY, recipe_input
from .k_diffusion import NOISE_SOURCES, PER_IMAGE, sample_dmd2

MAX_SEED = 2**64 - 1


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_Sampler",
            display_name="DMD2 Sampler",
            category=CATEGORY,
            description="Denoise, add fresh noise, denoise: the loop a distilled model was trained "
            "in. Use it with cfg 1.",
            inputs=[
                io.Float.Input(
                    "strength",
                    default=settings.DEFAULT_STRENGTH,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the noise between steps is fresh. 1: all of it, as in "
                    "training. 0: none, deterministic from the first noise on (DDIM).",
                ),
                io.Int.Input(
                    "seed_offset",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    tooltip="Added to the sampling node's seed for the fresh noise. Change it to "
                    "vary details of an image while its first noise stays.",
                ),
                io.Combo.Input(
                    "noise",
                    options=list(NOISE_SOURCES),
                    default=PER_IMAGE,
                    tooltip="per image: fresh noise that does not depend on batch size or device. "
                    "stock: what ComfyUI's own lcm sampler draws for the same seed.",
                ),
                recipe_input("the strength"),
            ],
            outputs=[
                io.Sampler.Output(
                    display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced."
                )
            ],
        )

    @classmethod
    def execute(
        cls, strength: float, seed_offset: int, noise: str, recipe: Recipe | None = None
    ) -> io.NodeOutput:
        options = {
            "strength": settings.noise_strength(recipe, strength),
            "seed_offset": seed_offset,
            "noise_source": noise,
        }
        return io.NodeOutput(KSAMPLER(sample_dmd2, options))
