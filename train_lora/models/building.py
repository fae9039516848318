"""Networks filled with the tensors of a file: what loaders of both forms share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .components import Kind
from .markers import Statement
from .places import REMEDY

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedNetworks:
    """What a loader finds, before anything is concluded from it."""

    kind: Kind
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoders: list[CLIPTextModel | CLIPTextModelWithProjection]
    statements: list[Statement]
    """What the file says about its prediction type."""
    base_hash: str


def filled(
    build: Callable[[], Any],
    state_for: Callable[[list[str]], dict[str, Tensor]],
    dtype: torch.dtype,
) -> Any:
    """The network `build` makes, holding copies of the tensors (not the mapped file)."""
    from accelerate import init_empty_weights

    with init_empty_weights():
        network = build()
    state = state_for(list(network.state_dict()))
    for key in state:  # one at a time: the mapped originals can leave the memory again
        state[key] = state[key].to(dtype, copy=True, memory_format=torch.contiguous_format)
    network.load_state_dict(state, strict=True, assign=True)
    return network


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}): {REMEDY}") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): {REMEDY}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} does not hold a JSON object: {REMEDY}")
    return content


def first_line(error: Exception) -> str:
    """The line that says something: torch puts a heading above what does not fit."""
    lines = str(error).strip().split("\n")
    return lines[1 if lines[0].endswith(":") and lines[1:] else 0].strip()
