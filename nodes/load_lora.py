"""The node that applies a distilled LoRA and hands on the recipe in its file."""

from __future__ import annotations

import os
from typing import Any

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..dmd2_core import Recipe
from . import lora
from .common import CATEGORY, DMD2Recipe


class LoadLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DMD2_LoadLoRA",
            display_name="DMD2 Load LoRA",
            category=CATEGORY,
            description="Applies a distilled LoRA and reads how it wants to be sampled. Says what "
            "was applied, and refuses a LoRA that was made for another architecture.",
            inputs=[
                io.Model.Input("model", tooltip="The model the LoRA was distilled from."),
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
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
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the LoRA applied."),
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
    def execute(cls, model: Any, lora_name: str, strength: float) -> io.NodeOutput:
        path = folder_paths.get_full_path_or_raise("loras", lora_name)
        tensors, metadata = comfy.utils.load_torch_file(path, safe_load=True, return_metadata=True)
        recipe = Recipe.from_metadata(metadata)
        patched, applied = lora.apply_lora(model, tensors, strength, lora_name)
        if metadata:
            patched.set_attachments("lora_metadata", metadata)
        sampling = model.get_model_object("model_sampling")
        report = lora.report(applied, recipe, sampling, strength, lora_name)
        return io.NodeOutput(patched, recipe, report)
