"""The node that shows the same prompts and noise through several models (DMD2's Figure 6)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch
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
        systems = []
        if teacher is not None:
            systems.append(_teacher(teacher, teacher_steps, teacher_guidance, _encoded(clip, "")))
        for number in range(1, NUM_MODELS + 1):
            model = models_and_labels.get(f"model_{number}")
            if model is not None:
                label = models_and_labels.get(f"label_{number}", "").strip()
                systems.append(_student(model, label or f"Model {number}"))
        shape = (1, 4, height // LATENT_PX, width // LATENT_PX)
        latent = {"samples": torch.zeros(shape, device=_device())}
        columns = []
        for label, detail, run in systems:
            samples = [
                sampling.sample(run(text, latent, ImageNoise(seed=(seed + row) & MAX_SEED)))
                for row, text in enumerate(texts)
            ]
            pictures = [vae.decode(sample["samples"])[0].cpu() for sample in samples]
            columns.append(Column(label=label, detail=detail, pictures=pictures))
        return io.NodeOutput(labelled_grid(columns, captions))


MakeRun = Callable[[Conditioning, dict[str, Any], ImageNoise], sampling.Run]
System = tuple[str, str, MakeRun]
"""What to write above a column, and how each of its pictures is sampled."""


def _student(model: Any, label: str) -> System:
    """A few-step model, by its recipe."""
    recipe = recipe_for(model, None)
    prepared, plan = sampling.prepared(model, recipe, steps=0, denoise=1.0)
    strength = sampling.noise_strength(recipe, plan)

    def run(text: Conditioning, latent: dict[str, Any], noise: ImageNoise) -> sampling.Run:
        return sampling.Run(
            model=prepared, plan=plan, positive=text, latent=latent, noise=noise, strength=strength
        )

    detail = _steps(len(plan.timesteps)) + (", no recipe" if recipe is None else "")
    return label, detail, run


def _teacher(model: Any, num_steps: int, guidance: float, empty: Conditioning) -> System:
    """The undistilled model: DDIM with guidance on every step."""
    _, plan = sampling.prepared(model, None, steps=num_steps, denoise=1.0)
    guided_steps = tuple(range(1, num_steps + 1)) if guidance != 1.0 else ()

    def run(text: Conditioning, latent: dict[str, Any], noise: ImageNoise) -> sampling.Run:
        return sampling.Run(
            model=model,
            plan=plan,
            positive=text,
            negative=None if has_zero_unconditional(model) else empty,
            latent=latent,
            noise=noise,
            strength=sampling.DDIM,
            guidance=guidance,
            guided_steps=guided_steps,
        )

    detail = _steps(num_steps) + (f", guidance {guidance:g}" if guided_steps else "")
    return "Teacher", detail, run


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


def _device() -> torch.device:
    return comfy.model_management.intermediate_device()
