"""What a model may be named by. Imports nothing heavy: a name that leads nowhere shows at once."""

from __future__ import annotations

import re
from pathlib import Path

REMEDY = (
    "give an SDXL or SD1.5 checkpoint (.safetensors), a diffusers folder of one, or what dmd2 "
    "convert-edm wrote"
)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether `name` reads like "org/name" and not like a path."""
    looks_like_a_file = name.endswith((".safetensors", ".ckpt", ".pt", ".pth", ".bin"))
    return bool(_HUB_ID.fullmatch(name)) and not looks_like_a_file


def check_model_path(name: str) -> None:
    """ValueError for what is neither there nor reads like a hub id."""
    if not Path(name).exists() and not is_hub_id(name):
        raise ValueError(f"{name} does not exist: {REMEDY}.")
