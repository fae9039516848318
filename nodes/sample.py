"""The node that samples a distilled model with nothing else to set."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import sampling, settings
from .common import CATEGORY, recipe_input, search_aliases
from .guider import parse_guidance_steps
from .image_noise import MAX_SEED, ImageNoise, parse_seeds
from .nag import DEFAULT_SCALE
from .plan_view import plan_ui
from .recipes import recipe_for
from .scheduler import MAX_STEPS


class Sample(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_Sample",
            display_name="DMD2 Sample",
            category=CATEGORY,
            **search_aliases(
                "few step sampler",
                "4 steps",
                "1 step",
                "nag",
                "fast sdxl",
                "lcm",
                "txt2img",
                "img2img",
            ),
            description="Samples a few-step model as it was trained: steps, noise and conditioning "
            "timestep come from the recipe. A negative prompt works without a second pass.",
            inputs=[
                io.Model.Input("model", tooltip="A model with a few-step LoRA, or one merged."),
                io.Conditioning.Input("positive", tooltip="What the image shall show."),
                io.Latent.Input(
                    "latent_image",
                    tooltip="Empty for text to image; an image for image to image and inpainting.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Decides all noise, that between the steps too.",
                ),
                io.Int.Input(
                    "steps",
                    optional=True,
                    default=0,
                    min=0,
                    max=MAX_STEPS,
                    tooltip="0: as the recipe says, or 4 without one.",
                ),
                io.Float.Input(
                    "denoise",
                    optional=True,
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="1: text to image. Less: image to image, which starts at the trained "
                    "timestep nearest to this amount; less keeps more of the image.",
                ),
                io.Float.Input(
                    "nag_scale",
                    optional=True,
                    default=DEFAULT_SCALE,
                    min=1.0,
                    max=20.0,
                    step=0.1,
                    tooltip="How strongly the negative prompt acts, by normalized attention "
                    "guidance. 1: not at all. Without a negative prompt it does nothing.",
                ),
                io.Float.Input(
                    "guidance",
                    optional=True,
                    default=1.0,
                    min=1.0,
                    max=10.0,
                    step=0.05,
                    tooltip="CFG for the steps in guidance_steps; each of them then takes two "
                    "passes. 1: off, which is what the model was trained for.",
                ),
                io.String.Input(
                    "guidance_steps",
                    optional=True,
                    default="1",
                    tooltip="The steps that guidance acts on, such as 1 or 1, 2; 1 is the first "
                    "that runs. Empty: all.",
                ),
                io.String.Input(
                    "seeds",
                    optional=True,
                    default="",
                    tooltip="A seed for each image of the batch, such as 11, 12, 40: each comes "
                    "out as it does alone with that seed. Empty: seed for the whole batch.",
                ),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What the image shall not show. It acts through nag_scale, and on the "
                    "steps with guidance as usual.",
                ),
                io.Model.Input(
                    "base_model",
                    optional=True,
                    tooltip="For more variety: the model as it is before the few-step LoRA. It "
                    "makes the first step, where a distilled model loses variety.",
                ),
                recipe_input("steps, timesteps and noise"),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="For VAE Decode."),
                io.String.Output(
                    display_name="plan", tooltip="What was done, in words, for Preview as Text."
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        positive: Any,
        latent_image: dict[str, Any],
        seed: int,
        steps: int = 0,
        denoise: float = 1.0,
        nag_scale: float = DEFAULT_SCALE,
        guidance: float = 1.0,
        guidance_steps: str = "1",
        seeds: str = "",
        negative: Any = None,
        base_model: Any = None,
        recipe: Recipe | None = None,
    ) -> io.NodeOutput:
        listed = parse_seeds(seeds)
        if denoise == 0:
            nothing = "Denoise 0: no step runs, the image stays."
            return io.NodeOutput(latent_image, nothing, ui={"text": (nothing,)})
        recipe = recipe_for(model, recipe)
        prepared, plan = sampling.prepared(model, recipe, steps, denoise)
        guided_steps = parse_guidance_steps(guidance_steps, len(plan.active))
        if guidance == 1.0:
            guidance, guided_steps = sampling.guidance_of(recipe, plan)
        if base_model is not None:
            sampling.check_base(base_model, prepared, plan)
        run = sampling.Run(
            model=prepared,
            plan=plan,
            positive=positive,
            negative=negative,
            latent=latent_image,
            noise=ImageNoise(seed=seed, batch_index=latent_image.get("batch_index"), listed=listed),
            strength=sampling.noise_strength(recipe, plan),
            guidance=guidance,
            guided_steps=guided_steps,
            nag_scale=nag_scale,
            base=base_model,
        )
        result = sampling.sample(run)
        sentences = [settings.describe_plan(plan, denoise, recipe), *run.remarks()]
        if recipe is None:
            sentences.append(sampling.note_without_recipe(model))
        text = " ".join(sentences)
        model_sampling = prepared.get_model_object("model_sampling")
        return io.NodeOutput(result, text, ui=plan_ui(text, plan, model_sampling))
