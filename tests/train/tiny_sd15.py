"""SD1.5 in small with random weights: its structure (8 heads, 1x1 projections, four levels)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import unfold

from dmd2_core import VPSchedule, add_noise, coefficients
from train_lora.data.training_data import TrainingData
from train_lora.demo import architecture
from train_lora.distill import RealImages
from train_lora.models import sd15_config
from train_lora.models.components import Components
from train_lora.models.fingerprint import unet_hash
from train_lora.models.text import Condition, encode_prompts, encoded, size_ids
from train_lora.models.tokenizer import build_tokenizers

WIDTH = 32
UNET_CONFIG: dict[str, Any] = sd15_config.UNET | {
    "sample_size": 32,
    "block_out_channels": (32, 64, 64, 64),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": architecture.NORM_GROUPS,
}
SHALLOW: dict[str, Any] = {
    "block_out_channels": (32, 32, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
"""With a level less, so that pictures of 128 px suffice for the discriminator."""
VAE_CONFIG: dict[str, Any] = architecture.VAE_CONFIG | {
    "scaling_factor": sd15_config.LATENT_SCALE,
    "sample_size": 256,
}


def random_sd15(seed: int = 0, **structure: Any) -> Components:
    """`structure`: of the UNet, in place of `UNET_CONFIG`'s."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet, vae = UNet2DConditionModel(**UNET_CONFIG | structure), AutoencoderKL(**VAE_CONFIG)
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


DRAWN_MEAN = (1.2, -0.8, 0.5, -1.0)
"""Of each channel, where there is a caption."""
UNPROMPTED = 0.25
"""Share of that mean for the empty prompt, so that guidance of scale g leads somewhere: to
1 + (g - 1) (1 - UNPROMPTED) times the mean. Adapters reach a mean sooner than a deviation."""
DRAWN_DEVIATION = 0.3
_CAPTION_WEIGHT = 4.0
"""Factor of what a random network takes from the caption, which is little."""


@torch.no_grad()
def drawing_sd15(side_px: int = 128) -> Components:
    """One that has learnt something: latents of `DRAWN_MEAN`, for v, and another without caption.

    The last layer alone is fitted, by least squares: random features suffice for so little.
    """
    model, count, cells = random_sd15(**SHALLOW), 48, side_px // 8
    generator = torch.Generator().manual_seed(7)
    captions = ["a red ring", "a green star", "a blue ring", ""] * (count // 4)
    for name, module in model.unet.named_modules():
        if name.endswith("attn2.to_out.0"):
            module.weight.mul_(_CAPTION_WEIGHT)
    condition = encode_prompts(model, captions, side_px, side_px)
    share = torch.tensor([1.0 if caption else UNPROMPTED for caption in captions])
    noise = torch.randn(2, count, 4, cells, cells, generator=generator)
    x0 = share.view(-1, 1, 1, 1) * torch.tensor(DRAWN_MEAN).view(1, 4, 1, 1)
    x0 = x0 + DRAWN_DEVIATION * noise[0]
    t = torch.linspace(0, 999, count).long()[torch.randperm(count, generator=generator)]
    x_t = add_noise(model.schedule, x0, noise[1], t)
    alpha, sigma = coefficients(model.schedule, t, x_t)
    seen: list[torch.Tensor] = []
    last = model.unet.conv_out
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.unet(x_t, t, condition.hidden)
    hook.remove()
    features = unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
    features = torch.cat([features, torch.ones(len(features), 1)], dim=1).double()
    targets = (alpha * noise[1] - sigma * x0).permute(0, 2, 3, 1).reshape(-1, 4).double()
    ridge = 1e-5 * len(features) * torch.eye(features.shape[1], dtype=torch.float64)
    fitted = torch.linalg.solve(features.T @ features + ridge, features.T @ targets)
    last.weight.copy_(fitted[:-1].T.reshape(last.weight.shape))
    last.bias.copy_(fitted[-1])
    return replace(model, prediction="v", base_hash=unet_hash(model.unet))


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
