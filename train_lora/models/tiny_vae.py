"""A tiny decoder in the VAE's place (TAESD, TAESDXL): scaled latents to pictures at little cost."""

from __future__ import annotations

import re
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .building import read_json
from .safetensors_io import read_safetensors

if TYPE_CHECKING:
    from diffusers import AutoencoderTiny

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
OPTION = "regression.tiny_vae"
_PREFIX = "decoder."
_ORIGINAL = re.compile(r"(\d+)\.(.+)")


def load_tiny_vae(path: Path, channels: int) -> AutoencoderTiny:
    """diffusers' AutoencoderTiny for latents of so many channels, without its encoder.

    float32, on the CPU, frozen.

    `path`: a diffusers folder; its weights' file; or its author's taesd_decoder.safetensors or
    taesdxl_decoder.safetensors. Sizes are those of the config.json beside diffusers' weights, else
    TAESD's. ValueError for anything else.
    """
    from diffusers import AutoencoderTiny

    file = path / WEIGHTS if path.is_dir() else path
    if file.suffix != ".safetensors" or not file.is_file():
        raise ValueError(
            f"{OPTION} is {str(path)!r}, which is neither a .safetensors file nor a folder with "
            f"{WEIGHTS}; name a folder, or a file, of diffusers' AutoencoderTiny."
        )
    found = read_safetensors(file)[0]
    by_author = all(_ORIGINAL.fullmatch(name) for name in found)
    config: dict[str, Any] = {}
    if (file.parent / CONFIG).is_file() and not by_author:
        config = read_json(file.parent / CONFIG)
    if config.get("_class_name", "AutoencoderTiny") != "AutoencoderTiny":
        raise ValueError(
            f"{OPTION} {str(path)!r} is a {config['_class_name']}, not an AutoencoderTiny; name "
            "one, or leave it out, then the model's own VAE decodes."
        )
    known = set(signature(AutoencoderTiny).parameters)  # saved ones have more, which it warns of
    with torch.device("meta"):
        vae = AutoencoderTiny(**{key: config[key] for key in sorted(known & config.keys())})
    del vae.encoder
    try:
        vae.decoder.load_state_dict((_of_author if by_author else _decoders)(found), assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{OPTION} {str(path)!r} does not hold the decoder of an AutoencoderTiny of its "
            f"{CONFIG}'s sizes; name another."
        ) from error
    if vae.config.latent_channels != channels:
        raise ValueError(
            f"{OPTION} {str(path)!r} decodes latents of {vae.config.latent_channels} channels, the "
            f"model's have {channels}; name the one for this kind of model."
        )
    return vae.float().requires_grad_(False).eval()


def _decoders(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n.removeprefix(_PREFIX): t for n, t in found.items() if n.startswith(_PREFIX)}


def _of_author(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """3.conv.0.weight -> layers.2.conv.0.weight: the author counts the clamp before the layers."""
    parts = ((name.partition("."), tensor) for name, tensor in found.items())
    return {f"layers.{int(place) - 1}.{rest}": tensor for (place, _, rest), tensor in parts}
