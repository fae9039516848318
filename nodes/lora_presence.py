"""Whether a model carries a few-step LoRA already: by what it says, and by its weights."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import comfy.lora
import comfy.lora_convert
from torch import Tensor

from ..dmd2_core.recipe import MERGED_KEY

PRESENT, ABSENT = 0.5, 0.25
"""Shares from and up to which a LoRA counts as present and absent; between them it is unclear.

On the embedded teacher a trained LoRA that is absent gives -0.3 to 0.05, a merged one 1 more."""
_NAMES = re.compile(
    r"[\w .-]{0,40}(?:dmd2|lightning|hyper[-_ ]?sd|turbo|(?<![a-z])lcm(?![a-z]))[\w .-]{0,40}",
    re.IGNORECASE,
)
_MAX_CHARACTERS = 1 << 20


def named_in(metadata: Mapping[str, str]) -> list[str]:
    """Where a checkpoint's metadata names a few-step method, for people.

    Titles and tags (modelspec), the models and LoRAs that other programs say they merged
    (A1111: sd_merge_models; ComfyUI's Save Checkpoint: the whole graph in "prompt").
    """
    found = []
    for key, value in sorted(metadata.items()):
        if key.startswith("modelspec.thumbnail"):
            continue
        match = _NAMES.search(str(value)[:_MAX_CHARACTERS])
        if match and "teacher" not in match[0]:
            found.append(f"its metadata {key[:60]} has {match[0].strip()!r}")
    return found


def merged_lora(metadata: Mapping[str, str]) -> str:
    """Which LoRA `dmd2 merge` says it baked in, in words; "" where it says nothing readable."""
    try:
        about = json.loads(metadata.get(MERGED_KEY, "")[:_MAX_CHARACTERS])
        return f"{str(about['lora'])[:100]} was merged at strength {float(about['strength']):g}"
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


def share_of(model: Any, tensors: Mapping[str, Tensor]) -> float | None:
    """How much of the LoRA is in the weights of ComfyUI's `model`: about its strength, 0 if absent.

    With D the LoRA's change of all layers and W the weights, patches included, it is
    <W, D> / <D, D>: adding s * D to W adds s. None if no plain layer of the LoRA fits.
    """
    tensors = comfy.lora_convert.convert_lora(dict(tensors))
    layers = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = model.get_key_patches("diffusion_model.")
    product = square = 0.0
    for module, layer in layers.items():
        up = tensors.get(f"{module}.lora_up.weight")
        down = tensors.get(f"{module}.lora_down.weight")
        if up is None or down is None or layer not in weights:
            continue
        (weight, _), *patches = weights[layer]
        if not weight.is_floating_point() or (len(up), down[0].numel()) != (
            len(weight),
            weight[0].numel(),
        ):
            continue
        matrix = comfy.lora.calculate_weight(patches, weight.float().clone(), layer).flatten(1)
        up, down = up.to(matrix).flatten(1), down.to(matrix).flatten(1)
        alpha = tensors.get(f"{module}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        product += scale * float(((up.T @ matrix) * down).sum())
        square += scale**2 * float(((up.T @ up) * (down @ down.T)).sum())
    return product / square if square > 0 else None
