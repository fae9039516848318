"""The node that applies a distilled LoRA and hands on the recipe in its file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import lora, recipes, settings
from .common import CATEGORY, DMD2Recipe, search_aliases
from .recipes import FAMILY_NAMES, FROM_FILE


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_LoadLoRA",
            display_name="DMD2 Load LoRA",
            category=CATEGORY,
            **search_aliases(
                "few step lora", "lcm lora", "lightning lora", "hyper-sd", "turbo", "distilled lora"
            ),
            description="Applies a distilled LoRA and reads how it wants to be sampled. Says what "
            "was applied, and refuses a LoRA that was made for another architecture.",
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA was distilled from."),
                io.Combo.Input(
                    "lora_name",
                    options=lora_files(),
                    tooltip="A file in the loras folder, exported by the trainer or published.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="How strongly the LoRA acts. It was trained at 1.",
                ),
                io.Combo.Input(
                    "family",
                    options=list(FAMILY_NAMES),
                    default=FROM_FILE,
                    tooltip="How to sample: what the file says, if it was made by this trainer. "
                    "For a published LoRA without a recipe choose what it is.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="Only for a LoRA that changes the text encoders too. DMD2's do not.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA applied."),
                io.Clip.Output(
                    display_name="clip", tooltip="The text encoders with the LoRA applied."
                ),
                DMD2Recipe.Output(
                    display_name="recipe",
                    tooltip="What the file says about sampling, for the other DMD2 nodes.",
                ),
                io.String.Output(
                    display_name="report",
                    tooltip="What was applied and what the recipe says, for Preview as Text.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str, **_: Any) -> str:
        """Load again when the file was exported anew under the same name."""
        path = folder_paths.get_full_path("loras", lora_name)
        return "" if path is None else str(os.stat(path).st_mtime_ns)

    @classmethod
    def execute(
        cls, model: Any, lora_name: str, strength: float, family: str, clip: Any = None
    ) -> io.NodeOutput:
        tensors, metadata = read_lora(lora_name)
        sampling = model.get_model_object("model_sampling")
        recipe = recipes.of_file(metadata, family, sampling)
        earlier = recipes.recipe_for(model, None)
        patched, patched_clip, applied = lora.apply_lora(model, clip, tensors, strength, lora_name)
        if metadata:
            patched.set_attachments(recipes.METADATA_ATTACHMENT, metadata)
        if recipe is not None:
            patched.set_attachments(recipes.RECIPE_ATTACHMENT, recipe)
        report = lora.report(
            applied,
            [*recipes.disagreements(recipe, sampling), *_twice(earlier, recipe)],
            _origin(family, recipe, metadata),
            strength,
            lora_name,
        )
        outputs = (patched, patched_clip, recipe or earlier, report)
        return io.NodeOutput(*outputs, ui={"text": (report,)})


def lora_files() -> list[str]:
    """What the loras folder holds in safetensors form; other formats can run code when read."""
    return [
        name
        for name in folder_paths.get_filename_list("loras")
        if name.endswith((".safetensors", ".sft"))
    ]


def read_lora(name: str) -> tuple[dict[str, Any], dict[str, str] | None]:
    """The tensors and metadata of a file in the loras folder; ValueError whatever is wrong."""
    path = folder_paths.get_full_path_or_raise("loras", name)
    try:
        return comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
    except Exception as error:  # safetensors' own kinds, which differ between its readers
        raise ValueError(
            f"the LoRA {name!r} cannot be read ({error}): download or export it again"
        ) from error


def _origin(family: str, recipe: Recipe | None, metadata: Mapping[str, str] | None) -> str:
    """Where the recipe is from and what it says."""
    said = settings.describe(recipe)
    if family == FROM_FILE:
        return said
    said = f"Chosen family {family}. {said}"
    try:
        own = Recipe.from_metadata(metadata)
    except ValueError:  # damaged: the family is the remedy
        return said
    if own is None:
        return said
    return (
        f"{said} The file has a recipe of its own, which this replaces; unless you know better, "
        f'set family to "{FROM_FILE}". Its own: {settings.describe(own)}'
    )


def _twice(earlier: Recipe | None, recipe: Recipe | None) -> list[str]:
    if earlier is None or recipe is None:
        return []
    return [
        "This model carries a few-step LoRA already: two of them spoil the picture. Remove one, "
        "or load a LoRA of style with ComfyUI's own loader."
    ]
