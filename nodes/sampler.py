"""The node that gives ComfyUI's sampling nodes the few-step loop of DMD2."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from comfy.samplers import KSAMPLER
from comfy_api.latest import io
from torch import Tensor

from ..dmd2_core import Recipe
from . import settings
from .common import CATEGORY, recipe_input, search_aliases
from .k_diffusion import NOISE_SOURCES, PER_IMAGE, sample_dmd2
from .recipes import recipe_for

MAX_SEED = 2**64 - 1
SEED_OF_THE_NODE = -1


class Sampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_Sampler",
            display_name="DMD2 Sampler",
            category=CATEGORY,
            **search_aliases("few step sampler", "lcm sampler", "re-noise", "noise injection"),
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
                io.String.Input(
                    "strengths",
                    default="",
                    tooltip="One strength per step after the first instead, such as 1, 0.5, 0.2 "
                    "for 4 steps. Empty: strength for all.",
                ),
                io.Int.Input(
                    "noise_seed",
                    default=SEED_OF_THE_NODE,
                    min=SEED_OF_THE_NODE,
                    max=MAX_SEED,
                    # Else the page, by this name, adds a control that randomises it.
                    control_after_generate=False,
                    tooltip="Seed of the fresh noise. -1: the sampling node's. Change it to vary "
                    "details of an image while its first noise stays.",
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
        cls,
        strength: float,
        strengths: str,
        noise_seed: int,
        noise: str,
        recipe: Recipe | None = None,
    ) -> io.NodeOutput:
        options = {
            "strength": settings.noise_strength(strength, strengths),
            "recipe": recipe,
            "noise_source": noise,
            "seed": None if noise_seed == SEED_OF_THE_NODE else noise_seed,
        }
        return io.NodeOutput(KSAMPLER(sample, options))


def sample(
    model: Any,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    *,
    strength: float | tuple[float, ...] | None,
    recipe: Recipe | None,
    noise_source: str,
    seed: int | None,
) -> Tensor:
    """ComfyUI's sampler function; a `strength` of None is the recipe's, connected or the model's.

    Which model that is is known only here: the node that makes the sampler does not see one.
    """
    if strength is None:
        recipe = recipe_for(getattr(model.inner_model, "model_patcher", None), recipe)
        strength = settings.DEFAULT_STRENGTH if recipe is None else recipe.strength
    return sample_dmd2(
        *(model, x, sigmas, extra_args, callback, disable),
        strength=strength,
        noise_source=noise_source,
        seed=seed,
    )
