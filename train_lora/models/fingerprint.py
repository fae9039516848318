"""The identity of a base model: a hash of its UNet's weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .convert import base_state_dict, unet_to_file
from .safetensors_io import tensor_bytes

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel


def unet_hash(unet: UNet2DConditionModel) -> str:
    """`weights_hash` of a network in memory, with or without adapters on it."""
    return weights_hash(unet_to_file(base_state_dict(unet), unet.config))


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes and float16 values of a UNet's tensors, in the order of names.

    `tensors`: LDM names without `model.diffusion_model.`, which are also the names inside ComfyUI.
    Rounding to float16 makes a float32 model and its float16 copy, as a folder or as one file, the
    same model. About 10 s for SDXL.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor.to(torch.float16)))
    return digest.hexdigest()
