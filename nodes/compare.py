"""The node that shows the same prompts and noise through several models (DMD2's Figure 6)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from comfy.model_management import intermediate_device
from comfy_api.latest import io

from . import sampling
from .common import CATEGORY, search_aliases
from .guider import Conditioning, has_zero_unconditional
from .image_noise import MAX_SEED, ImageNoise
from .picture_grid import Column, labelled_grid
from .recipes import recipe_for

NUM_MODELS, MAX_PROMPTS = 4, 16
LATENT_PX = 8


def _model_inputs() -> list[Any]:
    inputs = []
    for number in range(1, NUM_MODELS + 1):
        inputs.append(
            io.Model.Input(
                f"model_{number}",
                optional=number > 1,
                tooltip="A few-step model. Its recipe is the one that it carries.",
            )
        )
    for number in range(1, NUM_MODELS + 1):
        inputs.append(
            io.String.Input(
                f"label_{number}",
                optional=True,
                default="",
                tooltip=f"What to write above the pictures of model_{number}. Empty: its number.",
            )
        )
    return inputs


class Compare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        models = _model_inputs()
        return io.Schema(
            node_id="DMD2_Compare",
            display_name="DMD2 Compare",
            category=CATEGORY,
            **search_aliases("grid", "compare loras", "xy plot", "side by side"),
            description="The same prompts and the same noise through several models, as one "
            "labelled picture. Each model is sampled by the recipe that it carries.",
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoders for all models."),
                io.Vae.Input("vae", tooltip="The decoder for all models."),
                *models[:NUM_MODELS],
                io.Model.Input(
                    "teacher",
                    optional=True,
                    tooltip="The model without a few-step LoRA, sampled with many steps.",
                ),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="a photo of a fox in the snow\na portrait of an old fisherman",
                    tooltip="One prompt on each line.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="Of the first prompt; the next has the next number.",
                ),
                io.Int.Input(
                    "width", default=1024, min=64, max=4096, step=8, tooltip="Of each picture."
                ),
                io.Int.Input(
                    "height", default=1024, min=64, max=4096, step=8, tooltip="Of each picture."
                ),
                *models[NUM_MODELS:],
                io.Int.Input(
                    "teacher_steps",
                    optional=True,
                    default=30,
                    min=1,
                    max=200,
                    tooltip="Steps of the teacher (DDIM, evenly spaced).",
                ),
                io.Float.Input(
                    "teacher_guidance",
                    optional=True,
                    default=7.0,
                    min=1.0,
                    max=30.0,
                    step=0.1,
                    tooltip="CFG of the teacher; above 1 each of its steps takes two passes.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    display_name="grid", tooltip="A column for each model, a row for each prompt."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        clip: Any,
        vae: Any,
        prompts: str,
        seed: int,
        width: int,
        height: int,
        teacher: Any = None,
        teacher_steps: int = 30,
        teacher_guidance: float = 7.0,
        **models_and_labels: Any,
    ) -> io.NodeOutput:
        captions = _lines(prompts)
        texts = [_encoded(clip, text) for text in captions]
        empty = _encoded(clip, "")
        systems = []
        if teacher is not None:
            systems.append(_teacher(teacher, teacher_steps, teacher_guidance, empty))
        for number in range(1, NUM_MODELS + 1):
            model = models_and_labels.get(f"model_{number}")
            if model is not None:
                label = models_and_labels.get(f"label_{number}", "").strip()
                systems.append(_student(model, label or f"Model {number}", empty))
        shape = (1, 4, height // LATENT_PX, width // LATENT_PX)
        latent = {"samples": torch.zeros(shape, device=intermediate_device())}
        columns = []
        for label, detail, run in systems:
            pictures = []
            for row, text in enumerate(texts):
                noise = ImageNoise(seed=(seed + row) & MAX_SEED)
                sampled = sampling.sample(run(positive=text, latent=latent, noise=noise))
                pictures.append(vae.decode(sampled["samples"])[0].cpu())
            columns.append(Column(label=label, detail=detail, pictures=pictures))
        return io.NodeOutput(labelled_grid(columns, captions))


System = tuple[str, str, Callable[..., sampling.Run]]
"""What to write above a column, and the run that only lacks positive, latent and noise."""


def _student(model: Any, label: str, empty: Conditioning) -> System:
    """A few-step model, by its recipe."""
    recipe = recipe_for(model, None)
    prepared, plan = sampling.prepared(model, recipe, steps=0, denoise=1.0)
    guidance, guided_steps = sampling.guidance_of(recipe, plan)
    run = partial(
        sampling.Run,
        model=prepared,
        plan=plan,
        negative=None if has_zero_unconditional(model) else empty,
        strength=sampling.noise_strength(recipe, plan),
        guidance=guidance,
        guided_steps=guided_steps,
    )
    detail = _steps(len(plan.timesteps)) + (", no recipe" if recipe is None else "")
    return label, detail, run


def _teacher(model: Any, num_steps: int, guidance: float, empty: Conditioning) -> System:
    """The undistilled model: DDIM with guidance on every step."""
    _, plan = sampling.prepared(model, None, steps=num_steps, denoise=1.0)
    is_guided = guidance != 1.0
    run = partial(
        sampling.Run,
        model=model,
        plan=plan,
        negative=None if has_zero_unconditional(model) else empty,
        strength=sampling.DDIM,
        guidance=guidance,
        guided_steps=tuple(range(1, num_steps + 1)) if is_guided else (),
    )
    return "Teacher", _steps(num_steps) + is_guided * f", guidance {guidance:g}", run


def _steps(num: int) -> str:
    return f"{num} step{'s' * (num != 1)}"


def _lines(prompts: str) -> list[str]:
    """The prompts that are not empty; ValueError if there are none, or too many for a picture."""
    lines = [line.strip() for line in prompts.splitlines() if line.strip()]
    if not 1 <= len(lines) <= MAX_PROMPTS:
        raise ValueError(
            f"prompts has {len(lines)} lines with text: write one prompt on each of 1 to "
            f"{MAX_PROMPTS} lines"
        )
    return lines


def _encoded(clip: Any, text: str) -> Conditioning:
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))
