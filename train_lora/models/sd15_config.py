"""The configs of stable-diffusion-v1-5's networks: what full size means."""

from __future__ import annotations

from typing import Any

from . import sdxl_config

LATENT_SCALE = 0.18215
"""Latents are the VAE's means times this; no file says it, every SD1.5 has it."""
NUM_HEADS = 8
"""Attention heads of the UNet, at every level; no file says it."""

UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "norm_num_groups": 32,
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 1, 1, 1),
    "attention_head_dim": NUM_HEADS,  # the number of heads, whatever the name says
    "cross_attention_dim": 768,
    "use_linear_projection": False,
}
VAE: dict[str, Any] = sdxl_config.VAE | {"sample_size": 512, "scaling_factor": LATENT_SCALE}
CLIP_L: dict[str, Any] = sdxl_config.CLIP_L
