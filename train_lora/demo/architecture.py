"""SDXL in small: the embedded teacher's networks, with SDXL's structure and tiny widths.

Text encoders have 3 layers (ComfyUI reads the layer before the last), and
`projection_class_embeddings_input_dim` = width of encoder G + 6 * 256, as in SDXL.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

NORM_GROUPS = 8
"""Of every GroupNorm of UNet and VAE. SDXL's 32 would leave one channel to a group at these widths,
which takes each channel's mean, and so the picture's colour, out of every layer."""
LATENT_SCALE = 0.13025  # SDXL's; ComfyUI's latent format and diffusers' pipelines both use it
CLIP_TOKENS = 49408
WIDTH_L, WIDTH_G = 32, 64

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (32, 64, 96),
    "layers_per_block": 1,
    "transformer_layers_per_block": (1, 1, 1),
    "attention_head_dim": (1, 2, 3),  # the number of heads, whatever the name says
    "cross_attention_dim": WIDTH_L + WIDTH_G,
    "norm_num_groups": NORM_GROUPS,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": WIDTH_G + 6 * 256,
}
VAE_CONFIG: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (32, 32, 32, 64),
    "layers_per_block": 1,
    "norm_num_groups": NORM_GROUPS,
    "latent_channels": 4,
    "sample_size": 128,
    "scaling_factor": LATENT_SCALE,
}
_CLIP_COMMON: dict[str, Any] = {
    "num_hidden_layers": 3,
    "max_position_embeddings": 77,
}
CLIP_L_CONFIG: dict[str, Any] = _CLIP_COMMON | {
    "hidden_size": WIDTH_L,
    "intermediate_size": 4 * WIDTH_L,
    "num_attention_heads": 1,
    "hidden_act": "quick_gelu",
    "projection_dim": WIDTH_L,
}
CLIP_G_CONFIG: dict[str, Any] = _CLIP_COMMON | {
    "hidden_size": WIDTH_G,
    "intermediate_size": 4 * WIDTH_G,
    "num_attention_heads": 2,
    "hidden_act": "gelu",
    "projection_dim": WIDTH_G,
}


def build_unet() -> UNet2DConditionModel:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**UNET_CONFIG)


def build_vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**VAE_CONFIG)


def build_text_encoders(
    vocabulary: int = CLIP_TOKENS,
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Encoders L and G; the last two ids of the `vocabulary` are the start and end tokens."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    ids = {
        "vocab_size": vocabulary,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }
    return (
        CLIPTextModel(CLIPTextConfig(**CLIP_L_CONFIG | ids)),
        CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_G_CONFIG | ids)),
    )
