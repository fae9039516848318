"""Whether a model carries a few-step LoRA already: by what it says, and by its weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.model_management
import torch
from torch import Tensor

from ..dmd2_core.recipe import MERGED_KEY

PRESENT, ABSENT = 0.5, 0.25
"""Shares from and up to which a LoRA counts as present and absent; between them it is unclear.

On the embedded teacher, trained LoRAs that were absent gave -0.01 to 0.07, merged ones 0.72 to
0.83."""
MAX_ERROR = 0.12
"""Standard error up to which a share says anything: half of what absent and unclear differ by. A
LoRA that changes the model by a thousandth of its weights is not told from chance."""
MAX_LAYERS = 96
"""Looked at: enough for an error of 0.05 with the small teacher, and half a minute on a CPU for
SDXL (counted, not measured)."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """How much of a LoRA is in a model's weights: 0 if absent; merged at strength 1, 0.7 to 1."""

    value: float
    error: float
    """Its standard error, from how much the layers disagree."""

    @property
    def is_known(self) -> bool:
        return self.error <= MAX_ERROR


def share_of(model: Any, tensors: Mapping[str, Tensor]) -> Share | None:
    """The share of the LoRA in the weights of ComfyUI's `model`, patches included.

    In each layer, with D the LoRA's change and W the weights, <W, D> / <D, D>: adding s * D to W
    adds s. A trained D follows the strongest directions of W, merged or not, so both are looked at
    without those; what then disturbs a layer is about |W| / (|D| sqrt(elements)), by which layers
    are weighted. None if no plain layer of the LoRA fits.
    """
    found = list(_layers(model, comfy.lora_convert.convert_lora(dict(tensors))))
    num = min(len(found), MAX_LAYERS)
    chosen = [found[i * len(found) // num] for i in range(num)]
    rows = [_ratio_and_weight(weight(), change()) for weight, change in chosen]
    rows = [row for row in rows if row[1] > 0]
    if not rows:
        return None
    ratios, weights = torch.tensor(rows, dtype=torch.float64).T
    value = float((weights * ratios).sum() / weights.sum())
    error = float((weights * (ratios - value)).norm() / weights.sum())
    return Share(value=value, error=error if len(rows) > 1 else math.inf)


def _layers(
    model: Any, tensors: Mapping[str, Tensor]
) -> Iterator[tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """For each layer that both have: its weights and the LoRA's change, (out, in) matrices."""
    device = comfy.model_management.get_torch_device()
    weights = model.get_key_patches("diffusion_model.")
    for module, layer in comfy.lora.model_lora_keys_unet(model.model, {}).items():
        up = tensors.get(f"{module}.lora_up.weight")
        down = tensors.get(f"{module}.lora_down.weight")
        if up is None or down is None or layer not in weights:
            continue
        (weight, _), *patches = weights[layer]
        fits = (len(up), down[0].numel()) == (len(weight), weight[0].numel())
        if not fits or not weight.is_floating_point():
            continue
        alpha = tensors.get(f"{module}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / len(down)

        def whole(weight=weight, patches=patches, layer=layer) -> Tensor:
            copy = weight.to(device, torch.float32, copy=True)
            return comfy.lora.calculate_weight(patches, copy, layer).flatten(1)

        def change(up=up, down=down, scale=scale) -> Tensor:
            pair = (factor.to(device, torch.float32).flatten(1) for factor in (up, down))
            return scale * torch.matmul(*pair)

        yield whole, change


def _ratio_and_weight(weight: Tensor, change: Tensor) -> tuple[float, float]:
    """<W, D> / <D, D> without the strongest quarter of W's directions, and how much it counts."""
    if len(weight) > weight.shape[1]:
        weight, change = weight.T, change.T
    strongest = len(weight) // 4
    if strongest:
        left = torch.linalg.eigh(weight @ weight.T).eigenvectors[:, -strongest:]
        right = torch.linalg.qr(weight.T @ left).Q
        weight, change = (_without(matrix, left, right) for matrix in (weight, change))
    square, size = float(change.square().sum()), float(weight.square().sum())
    if not (square > 0 and size > 0 and math.isfinite(square + size)):
        return 0.0, 0.0
    return float((weight * change).sum()) / square, square / size * weight.numel()


def _without(matrix: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """`matrix` without the columns' part in `left` and the rows' part in `right`, orthonormal."""
    matrix = matrix - left @ (left.T @ matrix)
    return matrix - (matrix @ right) @ right.T
