"""Bakes a few-step LoRA into a checkpoint: one file that needs no LoRA and keeps its recipe.

W' = W + strength * (alpha / rank) * up @ down, in float32, rounded once to the checkpoint's type.
Tensors are read and written one at a time; what the LoRA does not touch is copied as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2_core import FAMILIES, Recipe, family_recipe
from dmd2_core.recipe import MERGED_KEY

from .lora_files import LoraModule, read_lora
from .lora_metadata import usage_hint
from .models.infer import infer_unet
from .models.markers import resolve, statements_of_file
from .models.names import UNET_PREFIX, kohya_name, renamed, unet_names
from .models.safetensors_io import data_hash, read_safetensors, write_safetensors

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_STALE = ("modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash")
"""Metadata that would be wrong for the new weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Merged:
    """What was written."""

    path: Path
    num_modules: int
    recipe: Recipe
    strength: float

    @property
    def summary(self) -> str:
        """For people: the file, and how to sample from it."""
        return (
            f"{self.path}: {self.num_modules} modules merged at strength {self.strength:g}; sample "
            f"it with {usage_hint(self.recipe, merged=True)}."
        )


def merge(
    checkpoint: Path, lora: Path, out: Path, *, strength: float = 1.0, family: str | None = None
) -> Merged:
    """Write `out`, a new file; every module of the LoRA must fit.

    `family` names the recipe of a published LoRA (dmd2_core.FAMILIES); its own recipe goes first.
    A checkpoint that carries a few-step LoRA already is refused, and so is a LoRA for another
    prediction type.
    """
    _check_options(out, strength)
    tensors, metadata = read_safetensors(checkpoint)
    _refuse_twice(checkpoint, metadata)
    modules, recipe = read_lora(lora)
    recipe = _recipe(checkpoint, tensors, metadata, lora, recipe, family)
    places = _places(checkpoint, tensors, lora, modules)

    def change(name: str, weight: Tensor) -> Tensor:
        if name not in places:
            return weight
        merged = weight.float() + strength * product(places[name]).reshape(weight.shape)
        changed = merged.to(weight.dtype)
        if not changed.isfinite().all():
            raise ValueError(
                f"{name} is not finite in {weight.dtype} after merging {lora}: use a lower "
                "--strength, or a checkpoint in float32"
            )
        return changed

    kept = {key: value for key, value in metadata.items() if key not in _STALE}
    written = kept | recipe.to_metadata() | _statement(checkpoint, kept, lora, recipe, strength)
    write_safetensors(out, tensors, written, change=change)
    return Merged(path=out, num_modules=len(places), recipe=recipe, strength=strength)


def product(module: LoraModule) -> Tensor:
    """(alpha / rank) * up @ down: (out, in * kernel), float32."""
    return (module.alpha / module.rank) * (module.up.flatten(1) @ module.down.flatten(1))


def _check_options(out: Path, strength: float) -> None:
    if out.suffix != ".safetensors":
        raise ValueError(f"--out is {str(out)!r}; name a file that ends in .safetensors.")
    if out.exists():
        raise ValueError(f"--out is {str(out)!r}, which exists; name another file.")
    if not math.isfinite(strength) or not 0 < strength <= 2:
        raise ValueError(f"--strength is {strength:g}; give more than 0 and at most 2.")


def _refuse_twice(checkpoint: Path, metadata: Mapping[str, str]) -> None:
    if MERGED_KEY in metadata or Recipe.from_metadata(metadata) is not None:
        raise ValueError(
            f"{checkpoint} carries a few-step LoRA already (its metadata has a recipe): merge into "
            "the checkpoint it was made from"
        )


def _recipe(
    checkpoint: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    lora: Path,
    recipe: Recipe | None,
    family: str | None,
) -> Recipe:
    """The recipe of the new file; ValueError if there is none, or one for another prediction."""
    if recipe is not None and recipe.prediction == "flow":
        raise ValueError(
            f"{lora} was trained on a model that predicts flow, which a merged checkpoint could "
            "not say: load the LoRA beside its model"
        )
    prediction, schedule = resolve(checkpoint, statements_of_file(tensors, metadata), "auto")
    zero_snr = schedule.has_zero_terminal_snr
    if prediction == "flow":
        raise ValueError(
            f"{checkpoint} predicts flow; few-step LoRAs are merged into models that predict "
            "epsilon or v: load the LoRA beside it"
        )
    if recipe is None and family is None:
        raise ValueError(
            f"{lora} has no recipe; say what it is with --family, one of: {', '.join(FAMILIES)}."
        )
    if recipe is None:
        assert family is not None
        return family_recipe(family, prediction, zero_snr)
    if family is not None:
        raise ValueError(f"{lora} has a recipe of its own; leave --family out.")
    if (recipe.prediction, recipe.zero_terminal_snr) != (prediction, zero_snr):
        kinds = [
            f"{kind} prediction{' with zero terminal SNR' * zero}"
            for kind, zero in (
                (recipe.prediction, recipe.zero_terminal_snr),
                (prediction, zero_snr),
            )
        ]
        raise ValueError(
            f"{lora} was trained on a model with {kinds[0]}, {checkpoint} has {kinds[1]}: merge "
            "into a model of the LoRA's kind"
        )
    return recipe


def _places(
    checkpoint: Path,
    tensors: Mapping[str, Tensor],
    lora: Path,
    modules: Mapping[str, LoraModule],
) -> dict[str, LoraModule]:
    """The checkpoint's tensors that change; ValueError unless every module has its place."""
    known = dict(_layers(checkpoint, tensors))
    places, problems = {}, []
    for name, module in modules.items():
        key = known.get(name)
        if key is None:
            problems.append(f"{name} (no such layer)")
            continue
        weight = tensors[key]
        found = (module.up.shape[0], module.down.shape[1:].numel())
        wanted = (weight.shape[0], weight.shape[1:].numel())
        if found != wanted:
            problems.append(f"{name} (for {found[0]} x {found[1]}, not {wanted[0]} x {wanted[1]})")
        elif weight.dtype not in _FLOATS:
            raise ValueError(
                f"{checkpoint} stores {key} as {weight.dtype}, which cannot be merged into: use "
                "the float16 or float32 version of this model"
            )
        places[key] = module
    if problems:
        raise ValueError(
            f"{lora} is for another architecture than {checkpoint}: {len(problems)} of its "
            f"{len(modules)} modules do not fit, first {problems[0]}: use a LoRA for this model"
        )
    return places


def _layers(checkpoint: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """(sd-scripts name, tensor) of each layer of the UNet, by LDM's and by diffusers' names."""
    weights = {
        name.removeprefix(UNET_PREFIX): name for name in tensors if name.startswith(UNET_PREFIX)
    }
    try:
        config = infer_unet({name: tensors[full].shape for name, full in weights.items()})
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"{checkpoint} is no SDXL or SD1.5 checkpoint in one file ({error}): name one"
        ) from error
    diffusers = {ldm: name for name, ldm in unet_names(config).items()}
    for name, full in weights.items():
        module = name.removesuffix(".weight")
        if module == name or tensors[full].ndim < 2:
            continue
        yield kohya_name(module), full
        yield kohya_name(renamed(module, diffusers)), full


def _statement(
    checkpoint: Path,
    metadata: Mapping[str, str],
    lora: Path,
    recipe: Recipe,
    strength: float,
) -> dict[str, str]:
    """What the file says about the merge, for people and for DMD2 Merge Check."""
    about: dict[str, Any] = {
        "lora": lora.name,
        "lora_sha256": data_hash(read_safetensors(lora)[0]),
        "strength": strength,
    }
    title = metadata.get("modelspec.title") or checkpoint.stem
    return {
        MERGED_KEY: json.dumps(about, sort_keys=True),
        "modelspec.title": f"{title}, with {lora.stem} merged",
        "modelspec.usage_hint": usage_hint(recipe, merged=True),
    }
