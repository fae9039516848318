"""LoRA adapters on a UNet: which modules get one, and with which weights it starts."""

from __future__ import annotations

import hashlib
import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
    "time_emb_proj",
)
"""Ends of the names of the modules that get an adapter: 788 modules in SDXL."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraSpec:
    """Size of one adapter: out += (alpha / rank) * up(down(x))."""

    rank: int
    alpha: float

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank is {self.rank}: use 1 or more, such as 64")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"LoRA alpha is {self.alpha}: use a positive number, such as 8")


def is_target(module: str) -> bool:
    """Whether the module of this (diffusers') name gets an adapter."""
    return any(module == target or module.endswith("." + target) for target in TARGETS)


def add_adapter(unet: UNet2DConditionModel, role: str, spec: LoraSpec) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=spec.rank, lora_alpha=spec.alpha, target_modules=list(TARGETS))
    with warnings.catch_warnings():  # the second adapter is meant
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        unet.add_adapter(config, adapter_name=role)


def lora_layers(unet: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(name, layer) for name, layer in unet.named_modules() if isinstance(layer, LoraLayer)]


@torch.no_grad()
def initialise(down: nn.Parameter, up: nn.Parameter, key: str) -> None:
    """Kaiming-uniform "down" and zero "up", float32, the same on every device and in any order."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    values = torch.empty(down.shape)
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=torch.Generator().manual_seed(seed))
    down.data = values.to(down.device)
    up.data = torch.zeros(up.shape, device=up.device)
    for weight in (down, up):
        weight.requires_grad_(True)
