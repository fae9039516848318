"""What a training holds on the GPU between iterations, in bytes, counted without having it.

Weights, optimizer states and the average are arithmetic over the networks' shapes (meta tensors).
Activations, gradients and the libraries' workspaces are not in it: a run on a GPU measures them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from train_lora.adversary import build_head
from train_lora.config import Config
from train_lora.demo import architecture
from train_lora.model_setup import autocast_dtype
from train_lora.models.roles import CRITIC, STUDENT, FullSpec, LoraSpec, SharedUNet
from train_lora.models.text import LATENT_PX

from .random_model import meta_unet

GIB = 2**30
EIGHT_BIT_MIN, EIGHT_BIT_BLOCK = 4096, 256
"""8-bit states: from so many numbers on, with a float32 scale for each block of so many."""


def resident_bytes(config: Config, kind: str) -> dict[str, int]:
    """Name -> bytes. `kind`: "sdxl" and "sd15" at full size, "tiny" for the embedded teacher's."""
    if config.model.base_precision in ("8bit", "4bit"):
        raise ValueError(
            f'model.base_precision is "{config.model.base_precision}", whose bytes only a run on '
            "the hardware tells: leave --plan out"
        )
    unet = _unet(config, kind)
    head: nn.Module = nn.Identity()
    if config.gan.enabled:
        with torch.device("meta"):
            head = build_head(config.gan, unet, config.data.resolution_px // LATENT_PX)
    student, critic = unet.parameters_of(STUDENT), unet.parameters_of(CRITIC)
    adapters = sum(_num_bytes(unet.parameters_of(role)) for role in unet.adapters)
    optimizer = config.training.optimizer
    resident = {
        "frozen base": _module_bytes(unet.unet) - adapters,
        "LoRA adapters": adapters,
        **{f"{role}'s weights": _module_bytes(copy) for role, copy in unet.copies.items()},
        "discriminator head": _module_bytes(head),
        "student's average": _num_bytes(student),
        "student's optimizer": optimizer_bytes(student, optimizer),
        "critic's optimizer": optimizer_bytes(critic, optimizer),
        "head's optimizer": optimizer_bytes(head.parameters(), optimizer),
    }
    return {name: num for name, num in resident.items() if num}


def optimizer_bytes(parameters: Iterable[Tensor], name: str) -> int:
    """Of AdamW's two states, float32 or in 8 bits."""
    total = 0
    for parameter in parameters:
        count = parameter.numel()
        if name == "adamw" or count < EIGHT_BIT_MIN:
            total += 2 * 4 * count
        else:
            total += 2 * (count + 4 * -(-count // EIGHT_BIT_BLOCK))
    return total


def memory_plan(config: Config, kind: str) -> str:
    """`resident_bytes` as a markdown table."""
    found, training = resident_bytes(config, kind), config.training
    lines = [
        f"{kind}, {config.data.resolution_px} px, rank {config.student.rank}, "
        f"{training.optimizer}; computed, not measured",
        "",
        "| on the GPU | GiB |",
        "|---|---|",
        *(f"| {name} | {num / GIB:.2f} |" for name, num in found.items()),
        f"| **between iterations** | **{sum(found.values()) / GIB:.2f}** |",
    ]
    return "\n".join(lines)


def _unet(config: Config, kind: str) -> SharedUNet:
    """In its roles, on the meta device."""
    from accelerate import init_empty_weights

    if kind == "tiny":
        with init_empty_weights():
            base = architecture.build_unet()
    else:
        base = meta_unet("sd15" if kind == "sd15" else "sdxl")
    specs = {
        role: FullSpec()
        if section.kind == "full"
        else LoraSpec(rank=section.rank, alpha=section.alpha)
        for role, section in ((STUDENT, config.student), (CRITIC, config.critic))
    }
    chosen = config.model.base_precision
    automatic = "bf16" if config.training.mixed_precision == "bf16" else "fp32"
    return SharedUNet(
        base,
        specs,
        seed=0,
        precision=automatic if chosen == "auto" else chosen,
        autocast=autocast_dtype(config),
    )


def _module_bytes(module: nn.Module) -> int:
    return _num_bytes([*module.parameters(), *module.buffers()])


def _num_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
