"""A model from a diffusers folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2_core.schedule import NUM_TIMESTEPS

from . import convert
from .building import REMEDY, LoadedNetworks, first_line, read_json
from .components import Kind
from .fingerprint import weights_hash
from .markers import is_flow_scheduler, statements_of_scheduler
from .names import unet_kind
from .safetensors_io import read_safetensors

INDEX = "model_index.json"
_KINDS: dict[str, Kind] = {"StableDiffusionXLPipeline": "sdxl", "StableDiffusionPipeline": "sd15"}
_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def load_folder(path: Path, dtype: torch.dtype) -> LoadedNetworks:
    """UNet in `dtype`, VAE and text encoders in float32, on the CPU."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    _check_is_diffusers(path)
    pipeline = read_json(path / INDEX).get("_class_name")
    if pipeline not in _KINDS:
        raise ValueError(f"{path} holds a {pipeline}, not one of {', '.join(_KINDS)}: {REMEDY}")
    kind = _KINDS[pipeline]
    scheduler = _read_scheduler(path / "scheduler" / "scheduler_config.json")
    unet = _load(UNet2DConditionModel, path / "unet", dtype)
    _check_unet(path / "unet", kind, unet.config)
    text_encoders = [_load(CLIPTextModel, path / "text_encoder", torch.float32)]
    if kind == "sdxl":
        second = _load(CLIPTextModelWithProjection, path / "text_encoder_2", torch.float32)
        text_encoders.append(second)
    return LoadedNetworks(
        kind=kind,
        unet=unet,
        vae=_load(AutoencoderKL, path / "vae", torch.float32),
        text_encoders=text_encoders,
        statements=statements_of_scheduler(scheduler),
        base_hash=_hash(path / "unet", unet.config),
    )


def _check_is_diffusers(path: Path) -> None:
    if (path / INDEX).is_file():
        return
    inside = sorted(path.glob("*.safetensors"))
    remedy = f"name the file itself, such as {inside[0]}" if inside else REMEDY
    raise ValueError(
        f"{path} is a folder without {INDEX}, so it is no diffusers folder, which has that file "
        f"beside unet/, vae/, text_encoder/ and scheduler/: {remedy}"
    )


def _check_unet(path: Path, kind: Kind, config: Mapping[str, Any]) -> None:
    """StableDiffusionPipeline is also the class of SD2.x, and channels tell editing models."""
    if unet_kind(config) != kind or (kind == "sd15" and config["use_linear_projection"]):
        what = "is not SDXL's or SD1.5's (SD2.x is not supported)"
    elif config["in_channels"] != 4:
        what = f"belongs to an inpainting or editing model with {config['in_channels']} channels"
    else:
        return
    raise ValueError(f"{path} {what}: {REMEDY}")


def _load(network: Any, folder: Path, dtype: torch.dtype) -> Any:
    kind = {"torch_dtype" if hasattr(network, "load_config") else "dtype": dtype}
    if not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        raise ValueError(
            f"{folder} holds only .bin weights, which are pickles and may run code when they are "
            "opened, so they are not read: get or save this model with .safetensors weights"
        )
    try:
        return network.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            variant=_variant(folder),
            **kind,
        )
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ValueError(f"{folder} cannot be loaded ({first_line(error)}): {REMEDY}") from error


def _variant(folder: Path) -> str | None:
    """ "fp16" where a folder holds nothing but such weights, as some downloads do."""
    names = [file.name for file in folder.glob("*.safetensors")]
    return "fp16" if names and all(".fp16" in name for name in names) else None


def _hash(folder: Path, config: Mapping[str, Any]) -> str:
    """From the stored weights, so that it does not depend on the dtype of loading."""
    variant = _variant(folder)
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if variant or ".fp16" not in file.name:
            weights |= read_safetensors(file)[0]
    return weights_hash(convert.unet_to_file(weights, config))


def _read_scheduler(path: Path) -> dict[str, Any]:
    config = read_json(path)
    steps = {"num_train_timesteps": NUM_TIMESTEPS}
    for key, value in (steps if is_flow_scheduler(config) else _BETAS | steps).items():
        if config.get(key) != value:
            raise ValueError(
                f"{path} has {key} {config.get(key)!r}, SDXL's and SD1.5's is {value!r}: {REMEDY}"
            )
    return config
