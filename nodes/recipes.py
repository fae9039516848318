"""Where a recipe comes from: the connection, the model, or the family that the user names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..dmd2_core import FAMILIES, Recipe, family_recipe
from .k_diffusion import FLOW_REMEDY, has_zero_snr, prediction_of

RECIPE_ATTACHMENT = "dmd2_recipe"
"""Our loader's: a Recipe."""
METADATA_ATTACHMENT = "lora_metadata"
"""ComfyUI's own loaders' (0.30 and later): the metadata of the LoRA that was loaded last."""
FROM_FILE = "from the file"


FAMILY_NAMES = (FROM_FILE, *FAMILIES)


def recipe_for(model: Any, recipe: Recipe | None) -> Recipe | None:
    """The recipe that goes with ComfyUI's `model`: the connected one, else what the model carries.

    A model knows it from our loader, or (ComfyUI 0.30) from a stock loader's LoRA. ValueError if
    the metadata of that LoRA is damaged.
    """
    if recipe is not None:
        return recipe
    attached = _attachment(model, RECIPE_ATTACHMENT)
    if isinstance(attached, Recipe):
        return attached
    metadata = _attachment(model, METADATA_ATTACHMENT)
    return Recipe.from_metadata(metadata) if isinstance(metadata, Mapping) else None


def _attachment(model: Any, key: str) -> Any:
    """None where the host keeps no attachments."""
    get = getattr(model, "get_attachment", None)
    return None if get is None else get(key)


def of_file(metadata: Mapping[str, str] | None, family: str, model_sampling: Any) -> Recipe | None:
    """The recipe of a LoRA file: its own, or that of the `family` that the user chose.

    The families' LoRAs are used on models of either prediction, so a family takes the model's.
    """
    if family == FROM_FILE:
        return Recipe.from_metadata(metadata)
    prediction = prediction_of(model_sampling) or "epsilon"
    zero_snr = prediction != "epsilon" and has_zero_snr(model_sampling)
    return family_recipe(family, prediction, zero_snr)


def disagreements(recipe: Recipe | None, model_sampling: Any) -> list[str]:
    """Where the model is not what the recipe's LoRA was trained on, one sentence each."""
    if recipe is None:
        return []
    if recipe.prediction == "flow":
        return [f"The LoRA was trained on a flow-matching model. {FLOW_REMEDY}"]
    found = []
    prediction = prediction_of(model_sampling)
    if prediction is not None and prediction != recipe.prediction:
        found.append(
            f"The LoRA was trained on a model with {recipe.prediction} prediction, this one uses "
            f"{prediction}: load the model it was made for, or set this one to "
            f"{recipe.prediction} prediction with ModelSamplingDiscrete."
        )
    if has_zero_snr(model_sampling) != recipe.zero_terminal_snr:
        trained = "with" if recipe.zero_terminal_snr else "without"
        found.append(
            f"The LoRA was trained {trained} zero terminal SNR, unlike this model: set zsnr "
            "accordingly in ModelSamplingDiscrete, or load the model it was made for."
        )
    return found


def check_fits(recipe: Recipe | None, model_sampling: Any) -> None:
    """ValueError if the recipe and the model that is about to be sampled contradict each other."""
    found = disagreements(recipe, model_sampling)
    if found:
        raise ValueError(" ".join(found))
