"""Applies a LoRA with ComfyUI's own loader, and knows afterwards what was really applied.

ComfyUI drops what it cannot place with a line in the log, and notices a wrong shape only while
sampling. Here both are said at once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
from torch import Tensor

from ..dmd2_core import Recipe
from . import settings
from .k_diffusion import prediction_of

_SUFFIX = re.compile(
    r"(\.alpha|\.dora_scale|[._]lora[._].*|\.lora_.*|\.(hada|lokr|oft|diff|set_weight|[wb]_norm).*)$"
)
ZERO_SNR_SIGMA = 1000.0
"""A k_sigma at t = 999 above this means zero terminal SNR (ComfyUI: 4518.8, otherwise 14.6)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """Which modules of a LoRA file found their layer."""

    modules: tuple[str, ...]
    """Every module named in the file."""
    missing: tuple[str, ...]
    """Those that the model has no layer for."""


def apply_lora(
    model: Any, tensors: Mapping[str, Tensor], strength: float, name: str
) -> tuple[Any, Applied]:
    """A patched clone of ComfyUI's `model` and the account of it.

    ValueError if not one module fits, or if a layer has another shape than the file's.
    """
    tensors = comfy.lora_convert.convert_lora(dict(tensors))
    layers = comfy.lora.model_lora_keys_unet(model.model, {})
    found = {module: layers.get(module) for module in _modules(tensors, layers)}
    missing = tuple(module for module, layer in found.items() if layer is None)
    if len(missing) == len(found):
        example = f", such as {missing[0]!r}," if missing else ""
        raise ValueError(
            f"none of the {len(found)} modules{example} in the LoRA {name!r} fits this model: it "
            "was made for another architecture. Load the kind of model it was trained on, or "
            "choose another LoRA"
        )
    _check_shapes(tensors, {m: layer for m, layer in found.items() if layer}, model, name)
    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, strength, 0.0)
    for module, layer in found.items():
        before, after = model.patches.get(layer, ()), patched.patches.get(layer, ())
        if layer is not None and len(after) == len(before):
            missing += (module,)
    return patched, Applied(modules=tuple(found), missing=missing)


def _modules(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> list[str]:
    """The modules that the file's keys belong to, in the file's order, each once."""
    modules: dict[str, None] = {}
    for key in tensors:
        heads = [key[: dot.start()] for dot in re.finditer(r"\.|_lora\.", key)]
        known = [head for head in heads if head in layers]
        modules[max(known, key=len) if known else _SUFFIX.sub("", key)] = None
    return list(modules)


def _check_shapes(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Any], model: Any, name: str
) -> None:
    """Compare each up x down pair with its layer; layers of packed integers cannot be compared."""
    weights = model.model.state_dict()
    for module, layer in layers.items():
        up = tensors.get(f"{module}.lora_up.weight")
        down = tensors.get(f"{module}.lora_down.weight")
        weight = weights.get(layer) if isinstance(layer, str) else None
        if up is None or down is None or weight is None or not weight.is_floating_point():
            continue
        shape = (up.shape[0], down.shape[1:].numel())
        if f"{module}.lora_mid.weight" not in tensors and shape != (
            weight.shape[0],
            weight.shape[1:].numel(),
        ):
            raise ValueError(
                f"the LoRA {name!r} does not fit this model: its module {module!r} is made for a "
                f"layer of {shape[0]} x {shape[1]}, the model's is {weight.shape[0]} x "
                f"{weight.shape[1:].numel()}. It was made for another architecture: load the kind "
                "of model it was trained on, or choose another LoRA"
            )


def report(
    applied: Applied, recipe: Recipe | None, model_sampling: Any, strength: float, name: str
) -> str:
    """What happened, for people; also written to the log, as warnings where something is amiss."""
    total, num_missing = len(applied.modules), len(applied.missing)
    lines = [f"{name}: {total - num_missing} of {total} modules applied at strength {strength:g}."]
    warnings = _disagreements(recipe, model_sampling)
    if num_missing:
        listed = ", ".join(applied.missing[:5]) + (", ..." if num_missing > 5 else "")
        warnings.insert(0, f"Not applied: {num_missing} modules that this model lacks: {listed}.")
    for line in lines:
        logging.info("DMD2: %s", line)
    for line in warnings:
        logging.warning("DMD2: %s: %s", name, line)
    return "\n".join([*lines, *warnings, settings.describe(recipe)])


def _disagreements(recipe: Recipe | None, model_sampling: Any) -> list[str]:
    """Where the model is not what the LoRA was trained on."""
    if recipe is None:
        return []
    found = []
    prediction = prediction_of(model_sampling)
    if prediction is not None and prediction != recipe.prediction:
        found.append(
            f"The LoRA was trained on a model with {recipe.prediction} prediction, this one uses "
            f"{prediction}: load the model it was made for."
        )
    has_zero_snr = float(getattr(model_sampling, "sigma_max", 0.0)) > ZERO_SNR_SIGMA
    if has_zero_snr != recipe.zero_terminal_snr:
        trained = "with" if recipe.zero_terminal_snr else "without"
        found.append(
            f"The LoRA was trained {trained} zero terminal SNR, unlike this model: set zsnr "
            "accordingly in ModelSamplingDiscrete, or load the model it was made for."
        )
    return found
