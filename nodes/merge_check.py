"""The node that says whether a model carries a few-step LoRA already."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import folder_paths
import safetensors
from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import lora_presence, recipes, settings
from .common import CATEGORY, DMD2Recipe, search_aliases
from .load_lora import lora_files, read_lora

NOT_NAMED, NONE = "not named", "none"


class MergeCheck(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_MergeCheck",
            display_name="DMD2 Merge Check",
            category=CATEGORY,
            **search_aliases("is merged", "double lora", "checkpoint info", "metadata"),
            description="Says whether a model already carries a few-step LoRA, and stops before a "
            "second one spoils the picture. A merged checkpoint with a recipe hands it on.",
            inputs=[
                io.Model.Input("model", tooltip="The model to look at. It passes through."),
                io.Combo.Input(
                    "checkpoint",
                    options=[NOT_NAMED, *_safetensors("checkpoints")],
                    default=NOT_NAMED,
                    tooltip="The file that the model was loaded from: its metadata may say what "
                    "was merged into it.",
                ),
                io.Combo.Input(
                    "lora_name",
                    options=[NONE, *lora_files()],
                    default=NONE,
                    tooltip="The few-step LoRA that you want to apply: its trace is looked for in "
                    "the model's weights.",
                ),
                io.Boolean.Input(
                    "refuse",
                    default=True,
                    tooltip="Stop with a message if lora_name would be the second few-step LoRA. "
                    "Off: only report.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model", tooltip="The same model, with its checkpoint's recipe."
                ),
                DMD2Recipe.Output(
                    display_name="recipe", tooltip="What is known of its sampling, if anything."
                ),
                io.String.Output(
                    display_name="report", tooltip="What was found, for Preview as Text."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, checkpoint: str, lora_name: str, **_: Any) -> list[int]:
        """Look again when a file was written anew under the same name."""
        named = (("checkpoints", checkpoint), ("loras", lora_name))
        paths = [folder_paths.get_full_path(folder, name) for folder, name in named]
        return [os.stat(path).st_mtime_ns for path in paths if path is not None]

    @classmethod
    def execute(cls, model: Any, checkpoint: str, lora_name: str, refuse: bool) -> io.NodeOutput:
        recipe = recipes.recipe_for(model, None)
        certain = [] if recipe is None else ["a few-step LoRA was loaded onto it"]
        probable: list[str] = []
        if checkpoint != NOT_NAMED:
            metadata = _metadata(checkpoint)
            merged = Recipe.from_metadata(metadata)
            if merged is not None:
                said = lora_presence.merged_lora(metadata) or "it has a recipe"
                certain.append(f"says the metadata of {checkpoint}, {said}")
                recipe = recipe or merged
                model = model.clone()
                model.set_attachments(recipes.RECIPE_ATTACHMENT, recipe)
            else:
                probable += lora_presence.named_in(metadata | {"file name": checkpoint})
        unclear = "" if lora_name == NONE else _weigh(model, lora_name, certain, probable)
        report = _report(certain, probable, recipe) + unclear
        if lora_name != NONE and certain and refuse:
            raise ValueError(
                f"{report} {lora_name} would be the second one: leave it out, use the checkpoint "
                "without a LoRA, or switch refuse off"
            )
        (logging.warning if certain or probable else logging.info)("DMD2: %s", report)
        return io.NodeOutput(model, recipe, report, ui={"text": (report,)})


def _safetensors(folder: str) -> list[str]:
    names = folder_paths.get_filename_list(folder)
    return [name for name in names if name.endswith((".safetensors", ".sft"))]


def _metadata(checkpoint: str) -> dict[str, str]:
    """What the file's header says beside its tensors."""
    path = folder_paths.get_full_path_or_raise("checkpoints", checkpoint)
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{checkpoint} cannot be read ({error}): download it again") from error


def _weigh(model: Any, lora_name: str, certain: list[str], probable: list[str]) -> str:
    """Add what the weights say about this LoRA; or a sentence why they say nothing."""
    tensors, _ = read_lora(lora_name)
    share = lora_presence.share_of(model, tensors)
    if share is None:
        raise ValueError(
            f"no layer of {lora_name} fits this model: it was made for another architecture"
        )
    if not share.is_known:
        return f" {lora_name} changes too little for its trace in the weights to be told."
    said = f"{share.value:.2f} of {lora_name} is in its weights (0.7 to 1: all of it)"
    if share.value >= lora_presence.PRESENT:
        certain.append(said)
    elif share.value > lora_presence.ABSENT:
        probable.append(said)
    return ""


def _report(certain: Sequence[str], probable: Sequence[str], recipe: Recipe | None) -> str:
    if certain:
        return (
            f"This model carries a few-step LoRA: {'; '.join([*certain, *probable])}. "
            f"{settings.describe(recipe) if recipe else 'Its recipe is not known.'}"
        )
    if probable:
        return f"This model may carry a few-step LoRA: {'; '.join(probable)}."
    return (
        "No sign of a few-step LoRA. (Without the checkpoint's name its metadata is not seen, "
        "without the LoRA's its trace in the weights is not looked for.)"
    )
