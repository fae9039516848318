"""Models of full size with random weights, from the packaged configs: nothing is downloaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from torch import nn

from dmd2_core import VPSchedule
from train_lora.models import sd15_config, sdxl_config
from train_lora.models.components import Components, Kind
from train_lora.models.text import encoded
from train_lora.models.tokenizer import build_tokenizers

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

UNET_CONFIGS: dict[Kind, dict[str, Any]] = {"sdxl": sdxl_config.UNET, "sd15": sd15_config.UNET}
BLOCK = 1 << 20
TEXT_LAYERS = 2
"""Of each text encoder: its output is as wide as the real one's, and no iteration calls it."""


def meta_unet(kind: Kind) -> UNet2DConditionModel:
    """The UNet without memory for its weights."""
    from diffusers import UNet2DConditionModel

    with init_empty_weights():
        return UNet2DConditionModel(**UNET_CONFIGS[kind]).requires_grad_(False).eval()


def random_components(kind: Kind, dtype: torch.dtype) -> Components:
    """A model whose UNet has random weights in `dtype`, on the CPU; its VAE has no memory."""
    from diffusers import AutoencoderKL

    unet = meta_unet(kind)
    fill(unet, dtype)
    with init_empty_weights():
        vae = AutoencoderKL(**(sdxl_config.VAE if kind == "sdxl" else sd15_config.VAE))
    encoders = _text_encoders(kind)
    tokenizers = build_tokenizers(len(encoders))
    sd15 = kind == "sd15"
    return Components(
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=tokenizers,
        schedule=VPSchedule.sd15() if sd15 else VPSchedule.sdxl(),
        prediction="epsilon",
        kind=kind,
        base_hash="",
        name=f"random-{kind}",
        empty_prompt=encoded(kind, encoders, tokenizers, [""])[0] if sd15 else None,
    )


def fill(network: nn.Module, dtype: torch.dtype) -> None:
    """Give a network on the meta device weights: norms 1, biases 0, all else small and random.

    One block of numbers is repeated: drawing 2.6 billion would take longer than the benchmark.
    """
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0))
    for module in network.modules():
        for name, empty in list(module._parameters.items()):
            if empty is None:
                continue
            if empty.ndim == 1:
                values = torch.full(empty.shape, float(name == "weight"), dtype=dtype)
            else:
                scaled = (0.5 * block * empty[0].numel() ** -0.5).to(dtype)
                copies = -(-empty.numel() // BLOCK)
                values = scaled.repeat(copies)[: empty.numel()].view(empty.shape).clone()
            module._parameters[name] = nn.Parameter(values, requires_grad=False)


def _text_encoders(kind: Kind) -> list[Any]:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    short = {"num_hidden_layers": TEXT_LAYERS}
    encoders: list[Any] = [CLIPTextModel(CLIPTextConfig(**sdxl_config.CLIP_L | short))]
    if kind == "sdxl":
        config = CLIPTextConfig(**sdxl_config.CLIP_G | short)
        encoders.append(CLIPTextModelWithProjection(config))
    return [encoder.requires_grad_(False).eval() for encoder in encoders]
