"""The node that shows the same prompts and noise through several models (DMD2's Figure 6)."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from ..dmd2_core import StepPlan
from . import sampling
from .common import CATEGORY
from .guider import Conditioning
from .image_noise import MAX_SEED, ImageNoise
from .picture_grid import Column, labelled_grid
from .recipes import recipe_for

NUM_MODELS, MAX_PROMPTS = 4, 16
LATENT_PX = 8
DDIM = 0.0
"""Noise strength of the teacher's sampler."""


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
                tooltip=f"What to write above the pictures of model_{number}. "
                "Empty: its number.",
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
        texts = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in captions]
        empty = clip.encode_from_tokens_scheduled(clip.tokenize(""))
        size = (4, height // LATENT_PX, width // LATENT_PX)
        systems = []
        if teacher is not None:
            steps, guidance = teacher_steps, teacher_guidance
            system = teacher_run(teacher, steps, guidance, texts[0], empty)
            systems.append(("Teacher", f"{steps} steps, guidance {guidance:g}", system))
        for number in range(1, NUM_MODELS + 1):
            model = models_and_labels.get(f"model_{number}")
            if model is None:
                continue
            label = models_and_labels.get(f"label_{number}", "").strip() or f"Model {number}"
            ...
        raise NotImplementedError
