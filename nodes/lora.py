"""Applies a LoRA with ComfyUI's own loader, and knows afterwards what was really applied.

ComfyUI drops what it cannot place with a line in the log, and notices a wrong shape only while
sampling. Here both are said at once.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import comfy.lora
import comfy.lora_convert
import comfy.sd
from torch import Tensor

_SUFFIX = re.compile(
    r"(\.alpha|\.dora_scale|[._]lora[._].*|\.lora_.*|\.(hada|lokr|oft|diff|set_weight|[wb]_norm).*)$"
)
_TEXT_ENCODER = re.compile(r"lora_te\d?_|lora_prior_te_|text_encoders?[._\d]|te\d?_")


@dataclass(frozen=True, kw_only=True, slots=True)
class Applied:
    """Which modules of a LoRA file found their layer."""

    modules: tuple[str, ...]
    """Every module named in the file."""
    missing: tuple[str, ...]
    """Those that have no layer in the model, nor in the text encoders if these are connected."""
    without_clip: tuple[str, ...]
    """Those for text encoders, which are not connected."""


def apply_lora(
    model: Any, clip: Any, tensors: Mapping[str, Tensor], strength: float, name: str
) -> tuple[Any, Any, Applied]:
    """Patched clones of ComfyUI's `model` and `clip` (None: not connected), and the account.

    ValueError if not one module fits, or if a layer has another shape than the file's.
    """
    tensors = comfy.lora_convert.convert_lora(dict(tensors))
    layers = comfy.lora.model_lora_keys_unet(model.model, {})
    weights = dict(model.model.state_dict())
    if clip is not None:
        layers = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, layers)
        weights |= clip.cond_stage_model.state_dict()
    found = {module: layers.get(module) for module in _modules(tensors, layers)}
    placed = {module: layer for module, layer in found.items() if layer is not None}
    if not placed:
        _refuse(found, name, clip is None)
    _check_shapes(tensors, placed, weights, name)
    patched, patched_clip = comfy.sd.load_lora_for_models(model, clip, tensors, strength, strength)
    unplaced = [module for module, layer in placed.items() if not _grew(layer, model, patched)]
    if clip is not None:
        unplaced = [m for m in unplaced if not _grew(placed[m], clip.patcher, patched_clip.patcher)]
    left = [module for module in found if module not in placed or module in set(unplaced)]
    texts = [module for module in left if clip is None and _TEXT_ENCODER.match(module)]
    applied = Applied(
        modules=tuple(found),
        missing=tuple(module for module in left if module not in set(texts)),
        without_clip=tuple(texts),
    )
    return patched, patched_clip, applied


def _refuse(found: Mapping[str, Any], name: str, without_clip: bool) -> NoReturn:
    """ValueError: nothing in the file has a place."""
    if found and without_clip and all(_TEXT_ENCODER.match(module) for module in found):
        raise ValueError(
            f"all {len(found)} modules of the LoRA {name!r} are for text encoders: connect clip"
        )
    example = next((f", such as {module!r}," for module in found), "")
    raise ValueError(
        f"none of the {len(found)} modules{example} in the LoRA {name!r} fits this model: it "
        "was made for another architecture. Load the kind of model it was trained on, or "
        "choose another LoRA"
    )


def _grew(layer: Any, before: Any, after: Any) -> bool:
    """Whether a patch for `layer` (its name; a tuple if with an offset) came between patchers."""
    layer = layer if isinstance(layer, str) else layer[0]
    return len(after.patches.get(layer, ())) > len(before.patches.get(layer, ()))


def _modules(tensors: Mapping[str, Tensor], layers: Mapping[str, Any]) -> list[str]:
    """The modules that the file's keys belong to, in the file's order, each once."""
    modules: dict[str, None] = {}
    for key in tensors:
        heads = [key[: dot.start()] for dot in re.finditer(r"\.|_lora\.", key)]
        known = [head for head in heads if head in layers]
        modules[max(known, key=len) if known else _SUFFIX.sub("", key)] = None
    return list(modules)


def _check_shapes(
    tensors: Mapping[str, Tensor],
    layers: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    name: str,
) -> None:
    """Compare each up x down pair with its layer; layers of packed integers cannot be compared."""
    for module, layer in layers.items():
        up = tensors.get(f"{module}.lora_up.weight")
        down = tensors.get(f"{module}.lora_down.weight")
        weight = weights.get(layer) if isinstance(layer, str) else None
        if up is None or down is None:
            continue
        if min(up.ndim, down.ndim) < 2 or up.shape[1] != down.shape[0]:
            raise ValueError(
                f"the LoRA {name!r} is damaged: the halves of its module {module!r} have shapes "
                f"{tuple(up.shape)} and {tuple(down.shape)}. Download or export it again"
            )
        if weight is None or not weight.is_floating_point():
            continue
        shape = (up.shape[0], down.shape[1:].numel())
        wanted = (weight.shape[0], weight.shape[1:].numel())
        if f"{module}.lora_mid.weight" not in tensors and shape != wanted:
            raise ValueError(
                f"the LoRA {name!r} does not fit this model: its module {module!r} is made for a "
                f"layer of {shape[0]} x {shape[1]}, the model's is {wanted[0]} x {wanted[1]}. It "
                "was made for another architecture: load the kind of model it was trained on, or "
                "choose another LoRA"
            )


def report(
    applied: Applied, disagreements: Sequence[str], recipe: str, strength: float, name: str
) -> str:
    """What happened, for people; also written to the log, as warnings where something is amiss.

    `recipe`: what is known of the sampling, in words.
    """
    left = len(applied.missing) + len(applied.without_clip)
    total = len(applied.modules)
    done = f"{name}: {total - left} of {total} modules applied at strength {strength:g}."
    warnings = list(disagreements)
    for modules, reason in (
        (applied.without_clip, "for the text encoders: connect clip"),
        (applied.missing, "that this model lacks"),
    ):
        if modules:
            listed = ", ".join(modules[:5]) + (", ..." if len(modules) > 5 else "")
            warnings.insert(0, f"Not applied: {len(modules)} modules {reason}: {listed}.")
    if len(applied.missing) > total // 10:
        warnings.insert(0, "Too much of the LoRA is missing for the picture it was trained for.")
    logging.info("DMD2: %s", done)
    for line in warnings:
        logging.warning("DMD2: %s: %s", name, line)
    return "\n".join([done, *warnings, recipe])
