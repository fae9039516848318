"""Weights that metrics bring from outside: read from a file that the user names, never fetched."""

from __future__ import annotations

import pickle
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.safetensors_io import read_safetensors


def read_weights(path: Path, option: str, source: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, on the CPU.

    `source`: where the file is published, for the error. Of a pickle only tensors are read: one
    that holds anything else is refused before it can run.
    """
    if not path.is_file():
        raise ValueError(
            f"{option} is {str(path)!r}, which is no file. Nothing is downloaded here: get it from "
            f"{source} and name the file."
        )
    if path.suffix == ".safetensors":
        return read_safetensors(path)[0]
    try:
        # Inception, AlexNet, VGG16 and LatentLPIPS are published as .pth only. `weights_only` knows
        # torch's own builders of tensors and plain containers; any other name is refused unrun.
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(
            f"{option} {str(path)!r} is damaged or holds more than tensors, so it is not read; "
            f"get it from {source}."
        ) from error
    if not isinstance(found, dict) or not all(isinstance(v, Tensor) for v in found.values()):
        raise ValueError(f"{option} {str(path)!r} is not a table of tensors; get it from {source}.")
    return found


def fill(network: nn.Module, weights: dict[str, Tensor], path: Path, option: str) -> None:
    """Give `network` exactly these weights; ValueError where names or sizes differ."""
    try:
        network.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        line = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise ValueError(
            f"{option} {str(path)!r} holds another network ({line[:120]}); name the right file."
        ) from error
    network.requires_grad_(False).eval()
