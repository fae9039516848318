"""Writing LoRA files, and giving a role the weights of one.

sd-scripts names with an explicit alpha are what ComfyUI, diffusers, A1111 and Forge all apply in
full; the recipe travels in the metadata.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dmd2_core import Recipe

from .lora_files import ALPHA, DOWN, UP, LoraModule, read_lora
from .lora_metadata import lora_metadata
from .models.names import kohya_name, kohya_names, ldm_lora_names, unet_kind
from .models.roles import STUDENT, LoraSpec, SharedUNet
from .models.safetensors_io import data_hash, write_safetensors

__all__ = [
    "LoraModule",
    "NameForm",
    "export_lora",
    "load_lora_into",
    "read_lora",
    "shared_unet_with_lora",
    "write_lora",
]

NameForm = Literal["sd-scripts", "diffusers"]
_REMEDY = "use a LoRA made for this base model"


def export_lora(
    unet: SharedUNet,
    role: str,
    path: str | Path,
    recipe: Recipe,
    *,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
    names: NameForm = "sd-scripts",
    side_px: int | None = None,
    thumbnail: str | None = None,
) -> None:
    """Write the role's adapter with its recipe; the same weights and recipe give the same bytes."""
    alpha = float(unet.adapters[role].alpha)
    modules = {
        module: LoraModule(down=down.detach(), up=up.detach(), alpha=alpha)
        for module, down, up in unet.pairs_of(role)
    }
    write_lora(
        modules,
        unet.unet.config,
        path,
        recipe,
        dtype=dtype,
        overwrite=overwrite,
        names=names,
        side_px=side_px,
        thumbnail=thumbnail,
    )


def write_lora(
    modules: Mapping[str, LoraModule],
    config: Mapping[str, object],
    path: str | Path,
    recipe: Recipe,
    *,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
    names: NameForm = "sd-scripts",
    side_px: int | None = None,
    thumbnail: str | None = None,
) -> None:
    """Write `modules` (by diffusers' names) as a LoRA for UNets of this config.

    Weights become `dtype`; alphas stay float32, so that any alpha is right. The recipe's rank and
    alpha are set to the largest module's. diffusers' names have no place for an alpha that
    everybody reads, so there it is multiplied into "up".
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: choose another name or allow overwriting")
    if names == "diffusers":
        modules = {module: _alpha_in_up(layer) for module, layer in modules.items()}
    largest = max(modules.values(), key=lambda layer: layer.rank)
    rank, alpha = largest.rank, float(largest.alpha)
    tensors = _tensors(modules, config, names, dtype)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} tensors of the LoRA are not finite in {dtype}, first {broken[0]}: "
            "the training diverged; export an earlier checkpoint"
        )
    recipe = replace(recipe, lora_rank=rank, lora_alpha=alpha)
    metadata = lora_metadata(
        recipe,
        unet_kind(config),
        side_px or 8 * int(str(config["sample_size"])),
        rank=rank,
        alpha=alpha,
        data_hash=data_hash(tensors),
        thumbnail=thumbnail,
    )
    write_safetensors(path, tensors, recipe.to_metadata() | metadata)


def _alpha_in_up(layer: LoraModule) -> LoraModule:
    scale = layer.alpha / layer.rank
    return LoraModule(down=layer.down, up=layer.up * scale, alpha=float(layer.rank))


def _tensors(
    modules: Mapping[str, LoraModule],
    config: Mapping[str, object],
    form: NameForm,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    if form == "diffusers":
        for module, layer in modules.items():
            tensors[f"unet.{module}.lora_A.weight"] = layer.down.to(dtype)
            tensors[f"unet.{module}.lora_B.weight"] = layer.up.to(dtype)
        return tensors
    names = kohya_names(modules, config)
    for module, layer in modules.items():
        tensors[names[module] + DOWN] = layer.down.to(dtype)
        tensors[names[module] + UP] = layer.up.to(dtype)
        tensors[names[module] + ALPHA] = torch.tensor(float(layer.alpha), dtype=torch.float32)
    return tensors


@torch.no_grad()
def load_lora_into(unet: SharedUNet, path: str | Path, role: str = STUDENT) -> Recipe | None:
    """Give the role the LoRA's weights; nothing is changed unless every module of the file fits.

    LDM and diffusers module names are both read. The file's alpha and a smaller rank than the
    role's are allowed: the role then computes exactly what the file says, and can be trained on.
    """
    modules, recipe = read_lora(path)
    fitted = _fitted(unet, path, modules, role)
    spec = unet.adapters[role]
    alpha = torch.tensor(float(spec.alpha)).item()  # as files hold it, so that equal gives 1
    for module, down, up in unet.pairs_of(role):
        up.zero_()
        if module in fitted:
            layer = fitted[module]
            scale = (layer.alpha / layer.rank) / (alpha / spec.rank)
            down[: layer.rank], up[:, : layer.rank] = layer.down, layer.up * scale
    return recipe


def shared_unet_with_lora(unet: object, path: str | Path) -> tuple[SharedUNet, Recipe | None]:
    """A plain UNet with the LoRA as its student, for sampling: of the file's rank and alpha."""
    modules, _ = read_lora(path)
    largest = max(modules.values(), key=lambda module: module.rank)
    spec = LoraSpec(rank=largest.rank, alpha=largest.alpha)
    shared = SharedUNet(unet, {STUDENT: spec}, seed=0)  # type: ignore[arg-type]
    return shared, load_lora_into(shared, path)


def _fitted(
    unet: SharedUNet, path: str | Path, modules: Mapping[str, LoraModule], role: str
) -> dict[str, LoraModule]:
    """The file's modules by diffusers' names; ValueError with a count where they do not fit."""
    adapted = unet.modules_with_adapter
    known = {name: module for module, name in ldm_lora_names(adapted, unet.unet.config).items()}
    known |= {kohya_name(module): module for module in adapted}
    sizes = {module: (down, up) for module, down, up in unet.pairs_of(role)}
    problems, fitted = [], {}
    for name, layer in modules.items():
        if name not in known:
            problems.append(f"{name} (no such module)")
            continue
        down, up = sizes[known[name]]
        wanted = (down.shape[1:], up.shape[:1] + up.shape[2:])
        if (layer.down.shape[1:], layer.up.shape[:1] + layer.up.shape[2:]) != wanted:
            sizes_found = f"{list(layer.down.shape)} and {list(layer.up.shape)}"
            problems.append(f"{name} (sizes {sizes_found}, base {list(down.shape)})")
        fitted[known[name]] = layer
    if problems:
        raise ValueError(
            f"{path} is for another architecture: {len(problems)} of its {len(modules)} modules "
            f"do not fit, first {problems[0]}: {_REMEDY}"
        )
    rank = max(layer.rank for layer in modules.values())
    if rank > unet.adapters[role].rank:
        raise ValueError(
            f"{path} has rank {rank}, the {role} only {unet.adapters[role].rank}: "
            f"set the {role}'s rank to {rank}"
        )
    return fitted
