"""A model from one .safetensors file with SDXL's or SD1.5's original names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import convert
from .building import REMEDY, LoadedNetworks, filled, first_line
from .components import Kind
from .fingerprint import weights_hash
from .infer import infer_configs
from .markers import statements_of_file
from .names import CLIP_G_PREFIX, CLIP_L_PREFIX, SD15_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX
from .safetensors_io import read_safetensors

_PARTS: dict[Kind, tuple[str, ...]] = {
    "sdxl": (UNET_PREFIX, VAE_PREFIX, CLIP_L_PREFIX, CLIP_G_PREFIX),
    "sd15": (UNET_PREFIX, VAE_PREFIX, SD15_CLIP_PREFIX),
}
_TITLES: dict[Kind, str] = {"sdxl": "SDXL", "sd15": "SD1.5"}
_DEFAULT_PX: dict[Kind, int] = {"sdxl": 1024, "sd15": 512}
_SHORT_CLIP_PREFIX = SD15_CLIP_PREFIX.removesuffix("text_model.")
"""Some SD1.5 files leave the word out."""
_EDM_TENSORS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")


def load_single_file(path: Path, dtype: torch.dtype) -> LoadedNetworks:
    """UNet in `dtype`, VAE and text encoders in float32, on the CPU."""
    file, metadata = read_safetensors(path)
    kind = _architecture(path, file)
    if kind == "sd15":
        file = _with_clips_full_names(file)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.items()}
    title = _TITLES[kind]
    try:
        configs = infer_configs(shapes, kind, _resolution_px(metadata, _DEFAULT_PX[kind]))
        networks = _build(file, kind, configs, dtype)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise ValueError(
            f"{path} does not have {title}'s structure ({reason}): {REMEDY}"
        ) from error
    weights = {
        name.removeprefix(UNET_PREFIX): tensor
        for name, tensor in file.items()
        if name.startswith(UNET_PREFIX)
    }
    return LoadedNetworks(
        kind=kind,
        **networks,
        statements=statements_of_file(file.keys(), metadata),
        base_hash=weights_hash(weights),
    )


def _architecture(path: Path, file: Mapping[str, Tensor]) -> Kind:
    """What the file is; ValueError with the name of what it is instead, where that is known."""

    def has(*beginnings: str) -> bool:
        return any(name.startswith(beginnings) for name in file)

    kind: Kind = "sd15" if has(_SHORT_CLIP_PREFIX) else "sdxl"
    missing = [part for part in _PARTS[kind] if not has(part)]
    if missing == [SD15_CLIP_PREFIX] and has(_SHORT_CLIP_PREFIX + "embeddings."):
        missing = []
    first = file.get(UNET_PREFIX + "input_blocks.0.0.weight")
    if any("lora_down." in name or "lora_A." in name for name in file):
        what = "is a LoRA, not a checkpoint"
    elif has("cond_stage_model.model."):
        what = "is a Stable Diffusion 2.x checkpoint, not SDXL or SD1.5"
    elif has("conditioner.embedders.0.model."):
        what = "is an SDXL refiner, not an SDXL base model"
    elif has("double_blocks.", "model.diffusion_model.double_blocks.", "joint_blocks."):
        what = "is a diffusion transformer (such as Flux or SD3), not SDXL or SD1.5"
    elif any(name in file for name in _EDM_TENSORS):
        what = "was trained on an EDM schedule, which is not that of SDXL and SD1.5"
    elif missing and has("down_blocks.", "encoder.", "decoder.", "text_model."):
        what = "is one network of a diffusers folder, not a checkpoint (name the folder above it)"
    elif missing == list(_PARTS[kind]):
        what = "is neither an SDXL nor an SD1.5 checkpoint"
    elif missing:
        what = f"is not a complete {_TITLES[kind]} checkpoint: it has no tensors {missing[0]}*"
    elif first is not None and first.ndim == 4 and first.shape[1] != 4:
        what = f"is an inpainting or editing model with {first.shape[1]} input channels, not 4"
    else:
        return kind
    raise ValueError(f"{path} {what}: {REMEDY}")


def _with_clips_full_names(file: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.replace(_SHORT_CLIP_PREFIX, SD15_CLIP_PREFIX)
        if name.startswith(_SHORT_CLIP_PREFIX) and not name.startswith(SD15_CLIP_PREFIX)
        else name: tensor
        for name, tensor in file.items()
    }


def _resolution_px(metadata: Mapping[str, str], default: int) -> int:
    """The side length in `modelspec.resolution` ("1024x1024"); the kind's if absent or odd."""
    side = metadata.get("modelspec.resolution", "").split("x")[0]
    return int(side) if side.isdecimal() and 8 <= int(side) <= 8192 else default


def _build(
    file: dict[str, Tensor], kind: Kind, configs: Mapping[str, dict[str, Any]], dtype: torch.dtype
) -> dict[str, Any]:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    unet, vae = configs["unet"], configs["vae"]
    clip_l = CLIPTextConfig(**configs["clip_l"])
    prefix = SD15_CLIP_PREFIX if kind == "sd15" else CLIP_L_PREFIX
    text_encoders = [
        filled(
            lambda: CLIPTextModel(clip_l),
            lambda keys: convert.clip_l_from_file(file, keys, prefix),
            torch.float32,
        )
    ]
    if kind == "sdxl":
        clip_g = CLIPTextConfig(**configs["clip_g"])
        text_encoders.append(
            filled(
                lambda: CLIPTextModelWithProjection(clip_g),
                lambda keys: convert.clip_g_from_file(file, keys, clip_g.num_hidden_layers),
                torch.float32,
            )
        )
    return {
        "unet": filled(
            lambda: UNet2DConditionModel(**unet),
            lambda keys: convert.unet_from_file(file, keys, unet),
            dtype,
        ),
        "vae": filled(
            lambda: AutoencoderKL(**vae),
            lambda keys: convert.vae_from_file(file, keys, vae),
            torch.float32,
        ),
        "text_encoders": text_encoders,
    }
