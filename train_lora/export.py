"""LoRA files: written in the one form that loads everywhere, read back completely or not at all.

sd-scripts names of LDM modules (`lora_unet_input_blocks_...`) with an explicit alpha are what
ComfyUI, diffusers, A1111 and Forge all apply in full; the recipe travels in the metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dmd2_core import Recipe

from .models.names import kohya_name, kohya_names
from .models.roles import STUDENT, LoraSpec, SharedUNet
from .models.safetensors_io import read_safetensors, write_safetensors

_DOWN, _UP, _ALPHA = ".lora_down.weight", ".lora_up.weight", ".alpha"
_REMEDY = "use a LoRA made for this base model"


def export_lora(
    unet: SharedUNet,
    role: str,
    path: str | Path,
    recipe: Recipe,
    *,
    dtype: torch.dtype = torch.float16,
    overwrite: bool = False,
) -> None:
    """Write the role's adapter with its recipe; the same weights and recipe give the same bytes.

    Weights become `dtype`; alphas stay float32, so that any alpha is right. The recipe's rank and
    alpha are set to the adapter's.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists: choose another name or allow overwriting")
    spec = unet.adapters[role]
    recipe = replace(recipe, lora_rank=spec.rank, lora_alpha=float(spec.alpha))
    names = kohya_names(unet.modules_with_adapter, unet.unet.config)
    tensors: dict[str, Tensor] = {}
    for module, down, up in unet.pairs_of(role):
        name = names[module]
        tensors[name + _DOWN], tensors[name + _UP] = down.detach().to(dtype), up.detach().to(dtype)
        tensors[name + _ALPHA] = torch.tensor(float(spec.alpha), dtype=torch.float32)
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(
            f"{len(broken)} tensors of the LoRA are not finite in {dtype}, first {broken[0]}: "
            "the training diverged; export an earlier checkpoint"
        )
    metadata = _metadata(spec, recipe, 8 * unet.unet.config.sample_size)
    write_safetensors(path, tensors, recipe.to_metadata() | metadata)


def _metadata(spec: LoraSpec, recipe: Recipe, side_px: int) -> dict[str, str]:
    """What other programs read: sd-scripts' `ss_*` and the basics of modelspec. No dates."""
    num_steps = len(recipe.timesteps)
    rank, alpha = str(spec.rank), str(float(spec.alpha))
    return {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_network_args": json.dumps({"conv_dim": rank, "conv_alpha": alpha}),
        "ss_base_model_version": "sdxl_base_v1-0",
        "ss_v2": "False",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": f"{recipe.base_model or 'SDXL'}, DMD2 in {num_steps} step"
        + "s" * (num_steps > 1),
        "modelspec.prediction_type": recipe.prediction,
        "modelspec.resolution": f"{side_px}x{side_px}",
    }


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LoraModule:
    """One module's part of a LoRA file; out += (alpha / rank) * up(down(x))."""

    down: Tensor
    """(rank, in) or (rank, in, k, k), float32."""
    up: Tensor
    """(out, rank) or (out, rank, 1, 1), float32."""
    alpha: float

    @property
    def rank(self) -> int:
        return len(self.down)


def read_lora(path: str | Path) -> tuple[dict[str, LoraModule], Recipe | None]:
    """The modules of a LoRA file by their sd-scripts names, and its recipe if it has one."""
    tensors, metadata = read_safetensors(path)
    names = {name.removesuffix(_DOWN) for name in tensors if name.endswith(_DOWN)}
    expected = {name + end for name in names for end in (_DOWN, _UP)}
    unknown = sorted(set(tensors) - expected - {name + _ALPHA for name in names})
    unpaired = sorted(expected - set(tensors))
    if not names or unknown or unpaired:
        if not names:
            reason = f"it has no {_DOWN} tensors"
        else:
            reason = f"no {unpaired[0]}" if unpaired else f"it holds {unknown[0]}"
        raise ValueError(
            f"{path} is not a plain LoRA in sd-scripts form ({reason}): "
            "use one exported here, or convert it to lora_down, lora_up and alpha"
        )
    modules = {name: _read_module(tensors, name) for name in sorted(names)}
    for name, module in modules.items():
        if module is None:
            raise ValueError(f"{path} has damaged tensors in {name}: download or export it again")
    return modules, Recipe.from_metadata(metadata)


def _read_module(tensors: Mapping[str, Tensor], name: str) -> LoraModule | None:
    """None unless the sizes make a low-rank product and every value is finite."""
    down, up = tensors[name + _DOWN].float(), tensors[name + _UP].float()
    # Without alpha the scale is 1, everywhere.
    alpha = tensors.get(name + _ALPHA, torch.tensor(float(down.shape[0]) if down.ndim else 0.0))
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != len(down) or alpha.numel() != 1:
        return None
    finite = all(bool(tensor.isfinite().all()) for tensor in (down, up, alpha))
    return LoraModule(down=down, up=up, alpha=float(alpha)) if finite else None


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
    ldm_names = kohya_names(unet.modules_with_adapter, unet.unet.config)
    known = {name: module for module, name in ldm_names.items()}
    known |= {kohya_name(module): module for module in ldm_names}
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
