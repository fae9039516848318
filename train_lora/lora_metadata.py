"""What an exported file tells other programs: sd-scripts' `ss_*`, sai_model_spec's `modelspec.*`.

Everything follows from the weights and the recipe; no dates, so that the same training gives the
same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dmd2_core import Recipe, StepPlan

from .models.components import Kind
from .models.saving import ARCHITECTURES

_BASE_VERSIONS: dict[Kind, str] = {"sdxl": "sdxl_base_v1-0", "sd15": "sd_v1"}
_IMPLEMENTATIONS: dict[Kind, str] = {
    "sdxl": "https://github.com/Stability-AI/generative-models",
    "sd15": "diffusers",
}
_FAMILIES: dict[Kind, str] = {"sdxl": "SDXL", "sd15": "SD1.5"}


def lora_metadata(
    recipe: Recipe,
    kind: Kind,
    side_px: int,
    *,
    rank: int,
    alpha: float,
    data_hash: str,
    thumbnail: str | None = None,
) -> dict[str, str]:
    """The metadata of a LoRA file beside its recipe.

    `side_px`: side of the pictures it was trained on; `data_hash`: sha256 of the file's tensor
    bytes; `thumbnail`: a data URL.
    """
    dim, scale = str(rank), str(float(alpha))
    sd_scripts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": dim,
        "ss_network_alpha": scale,
        "ss_network_args": json.dumps({"conv_dim": dim, "conv_alpha": scale}),
        "ss_base_model_version": _BASE_VERSIONS[kind],
        "ss_v2": "False",
        "ss_zero_terminal_snr": str(recipe.zero_terminal_snr),
        "ss_resolution": f"({side_px}, {side_px})",
        "ss_training_comment": usage_hint(recipe),
        "sshs_model_hash": data_hash,
    }
    if recipe.base_model:
        sd_scripts["ss_sd_model_name"] = recipe.base_model
    return (
        {"format": "pt"}
        | sd_scripts
        | _training(recipe.trained_with or {})
        | modelspec(recipe, kind, side_px, form="/lora", data_hash=data_hash, thumbnail=thumbnail)
    )


def modelspec(
    recipe: Recipe,
    kind: Kind,
    side_px: int,
    *,
    form: str,
    data_hash: str | None = None,
    thumbnail: str | None = None,
) -> dict[str, str]:
    """sai_model_spec 1.0.1; `form`: "/lora", or nothing for a whole checkpoint."""
    base = recipe.base_model or _FAMILIES[kind]
    steps = _count(*recipe.trained_steps or [len(recipe.timesteps)])
    identity = f" (sha256 of its UNet: {recipe.base_model_hash})" if recipe.base_model_hash else ""
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": ARCHITECTURES[kind] + form,
        "implementation": _IMPLEMENTATIONS[kind] if form else "sgm",
        "title": f"{base}, DMD2 in {steps}",
        "description": f"Makes images in {steps} with {base}{identity}, "
        "distilled with DMD2 (arXiv 2405.14867).",
        "usage_hint": usage_hint(recipe),
        "prediction_type": recipe.prediction,
        "resolution": f"{side_px}x{side_px}",
        "tags": "dmd2, few-step, distilled",
    }
    if data_hash:
        values["hash_sha256"] = f"0x{data_hash}"
    if thumbnail:
        values["thumbnail"] = thumbnail
    return {f"modelspec.{key}": value for key, value in values.items()}


def usage_hint(recipe: Recipe, *, merged: bool = False) -> str:
    """How to sample, for people: steps, CFG, sampler, scheduler, and the strength of a LoRA."""
    num_steps = len(recipe.timesteps)
    evenly = recipe.timesteps == StepPlan.evenly(num_steps).timesteps
    note = " (a negative prompt acts through NAG only)" if recipe.guidance == 1 else ""
    sampler = "sampler euler" if recipe.strength == 0 else "sampler lcm"
    others = "" if recipe.trained_steps is None else f" (or {_count(*recipe.trained_steps)})"
    words = [_count(num_steps) + others, f"CFG {recipe.guidance:g}{note}", sampler]
    if evenly and recipe.conditioning_timestep is None:
        words.append("scheduler simple")
    else:
        words.append(f"timesteps {', '.join(f'{t:g}' for t in recipe.timesteps)}")
    if recipe.conditioning_timestep is not None:
        words.append(
            f"the network must be told timestep {recipe.conditioning_timestep:g} at the first step "
            "(ComfyUI: DMD2 Conditioning Timestep)"
        )
    if not merged:
        words.append("LoRA strength 1")
    if recipe.prediction == "v":
        snr = " with zero terminal SNR" if recipe.zero_terminal_snr else ""
        words.append(f"the base model predicts v{snr}")
    elif recipe.prediction == "flow":
        at = (
            ""
            if evenly
            else f", sigmas {', '.join(f'{(t + 1) / 1000:g}' for t in recipe.timesteps)}"
        )
        words.append(f"the base model predicts flow (ComfyUI: ModelSamplingSD3 with shift 1{at})")
    return ", ".join(words)


def _count(*num_steps: int) -> str:
    return f"{' to '.join(map(str, num_steps))} step" + "s" * (num_steps[-1] > 1)


def _training(settings: Mapping[str, Any]) -> dict[str, str]:
    """sd-scripts' names for what the recipe says about the training, where it says so."""
    training, student = settings.get("training", {}), settings.get("student", {})
    if not isinstance(training, Mapping) or not isinstance(student, Mapping):
        return {}
    values = {
        "ss_learning_rate": student.get("learning_rate"),
        "ss_unet_lr": student.get("learning_rate"),
        "ss_max_train_steps": training.get("iterations"),
        "ss_steps": training.get("iterations"),
        "ss_batch_size_per_device": training.get("batch_size"),
        "ss_gradient_accumulation_steps": training.get("gradient_accumulation_steps"),
        "ss_max_grad_norm": training.get("max_grad_norm"),
        "ss_seed": training.get("seed"),
        "ss_mixed_precision": training.get("mixed_precision"),
        "ss_gradient_checkpointing": training.get("gradient_checkpointing"),
        "ss_optimizer": training.get("optimizer"),
    }
    return {key: str(value) for key, value in values.items() if value is not None}
