"""SD1.5 in small with random weights: its structure (8 heads, 1x1 projections, four levels)."""

from __future__ import annotations

from typing import Any

import torch

from dmd2_core import VPSchedule
from train_lora.data.training_data import TrainingData
from train_lora.demo import architecture
from train_lora.distill import RealImages
from train_lora.models import sd15_config
from train_lora.models.components import Components
from train_lora.models.fingerprint import unet_hash
from train_lora.models.text import Condition, encoded, size_ids
from train_lora.models.tokenizer import build_tokenizers

WIDTH = 32
UNET_CONFIG: dict[str, Any] = sd15_config.UNET | {
    "sample_size": 32,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": architecture.NORM_GROUPS,
}
VAE_CONFIG: dict[str, Any] = architecture.VAE_CONFIG | {
    "scaling_factor": sd15_config.LATENT_SCALE,
    "sample_size": 256,
}


def random_sd15(seed: int = 0) -> Components:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet, vae = UNet2DConditionModel(**UNET_CONFIG), AutoencoderKL(**VAE_CONFIG)
        encoder, _ = architecture.build_text_encoders()
        for network in (unet, vae, encoder):
            network.requires_grad_(False).eval()
            for name, weight in network.named_parameters():
                if "norm" in name or name.endswith("bias"):
                    weight.add_(torch.randn_like(weight), alpha=0.1)
    tokenizers = build_tokenizers(1)
    return Components(
        unet=unet,
        vae=vae,
        text_encoders=[encoder],
        tokenizers=tokenizers,
        schedule=VPSchedule.sd15(),
        prediction="epsilon",
        kind="sd15",
        base_hash=unet_hash(unet),
        name="tiny15",
        empty_prompt=encoded("sd15", [encoder], tokenizers, [""])[0],
    )


def sd15_condition(count: int, generator: torch.Generator, side_px: int = 256) -> Condition:
    return Condition(
        hidden=torch.randn(count, 77, WIDTH, generator=generator),
        pooled=torch.zeros(count, 0),
        time_ids=size_ids(count, side_px, side_px),
    )


def sd15_data(seed: int = 3) -> TrainingData:
    generator = torch.Generator().manual_seed(seed)
    return TrainingData.in_memory(
        captions=["a scene"] * 4,
        condition=sd15_condition(4, generator),
        real=RealImages(
            latents=torch.randn(4, 4, 32, 32, generator=generator),
            condition=sd15_condition(4, generator),
        ),
    )
