"""The configs of a single file's networks, read off its tensors' shapes.

Full SDXL and SD1.5 and small copies of their structure alike; what shapes cannot tell is their
convention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import sd15_config, sdxl_config
from .components import Kind
from .names import CLIP_G_PREFIX, CLIP_L_PREFIX, SD15_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX

Shapes = Mapping[str, Sequence[int]]


def head_width(model_channels: int) -> int:
    """Channels per attention head of SDXL's UNet and of all text encoders, which no file says.

    64 in SDXL (320 channels at the first level); small networks that 64 does not divide use 32.
    """
    return 32 if model_channels % 64 else 64


def norm_groups(first_level_channels: int) -> int:
    """Groups of every GroupNorm of a UNet or VAE, which no file says.

    SDXL has 32, which is 4 channels to a group in its VAE. Narrow networks keep those 4: groups of
    one channel would lose each channel's mean.
    """
    return min(32, first_level_channels // 4)


def infer_configs(shapes: Shapes, kind: Kind, resolution_px: int) -> dict[str, dict[str, Any]]:
    """Configs "unet", "vae", "clip_l" and, of SDXL, "clip_g" of the file with these tensors.

    `resolution_px`: the side of the pictures it was trained on, a default for pipelines only.
    Raises KeyError, IndexError or ValueError on tensors that the kind does not have.
    """
    model_channels = shapes[UNET_PREFIX + "input_blocks.0.0.weight"][0]
    width = head_width(model_channels)
    unet_shapes = _below(shapes, UNET_PREFIX)
    unet = infer_unet(unet_shapes)
    vae = _vae(_below(shapes, VAE_PREFIX))
    pixels_per_latent = 2 ** (len(vae["block_out_channels"]) - 1)
    unet["sample_size"], vae["sample_size"] = resolution_px // pixels_per_latent, resolution_px
    if kind == "sd15":
        return {
            "unet": sd15_config.UNET | unet,
            "vae": sd15_config.VAE | vae,
            "clip_l": _clip_l(_below(shapes, SD15_CLIP_PREFIX), width),
        }
    unet["attention_head_dim"] = tuple(channel // width for channel in unet["block_out_channels"])
    unet["projection_class_embeddings_input_dim"] = unet_shapes["label_emb.0.0.weight"][1]
    return {
        "unet": sdxl_config.UNET | unet,
        "vae": sdxl_config.VAE | vae,
        "clip_l": _clip_l(_below(shapes, CLIP_L_PREFIX), width),
        "clip_g": _clip_g(_below(shapes, CLIP_G_PREFIX), width),
    }


def infer_unet(shapes: Shapes) -> dict[str, Any]:
    """The config of the UNet with these tensors, named without a prefix.

    A level is the stages up to the next downsampling: (channels, transformer blocks) each.
    """
    levels: list[list[tuple[int, int]]] = [[]]
    for stage in range(1, _count(shapes, "input_blocks.")):
        if f"input_blocks.{stage}.0.op.weight" in shapes:
            levels.append([])
            continue
        channels = shapes[f"input_blocks.{stage}.0.out_layers.3.weight"][0]
        levels[-1].append((channels, _count(shapes, f"input_blocks.{stage}.1.transformer_blocks.")))
    if any(len(set(level)) != 1 or len(level) != len(levels[0]) for level in levels):
        raise ValueError(f"its UNet's levels are uneven: {levels}")
    channels = tuple(level[0][0] for level in levels)
    depths = tuple(level[0][1] for level in levels)
    attends = [depth > 0 for depth in depths]
    cross = shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1]
    return {
        "in_channels": shapes["input_blocks.0.0.weight"][1],
        "out_channels": shapes["out.2.weight"][0],
        "down_block_types": tuple("CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        "up_block_types": tuple(
            "CrossAttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)
        ),
        "block_out_channels": channels,
        "norm_num_groups": norm_groups(channels[0]),
        "layers_per_block": len(levels[0]),
        "transformer_layers_per_block": tuple(max(depth, 1) for depth in depths),
        "cross_attention_dim": cross,
        "use_linear_projection": len(shapes["middle_block.1.proj_in.weight"]) == 2,
    }


def _vae(shapes: Shapes) -> dict[str, Any]:
    num_levels = _count(shapes, "encoder.down.")
    channels = tuple(
        shapes[f"encoder.down.{level}.block.0.conv1.weight"][0] for level in range(num_levels)
    )
    return {
        "down_block_types": ("DownEncoderBlock2D",) * num_levels,
        "up_block_types": ("UpDecoderBlock2D",) * num_levels,
        "block_out_channels": channels,
        "norm_num_groups": norm_groups(channels[0]),
        "layers_per_block": _count(shapes, "encoder.down.0.block."),
        "latent_channels": shapes["decoder.conv_in.weight"][1],
    }


def _clip_l(shapes: Shapes, width: int) -> dict[str, Any]:
    num_tokens, hidden = shapes["embeddings.token_embedding.weight"]
    return sdxl_config.CLIP_L | {
        "vocab_size": num_tokens,
        "max_position_embeddings": shapes["embeddings.position_embedding.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": shapes["encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, "encoder.layers."),
        "num_attention_heads": hidden // width,
        "projection_dim": hidden,
    }


def _clip_g(shapes: Shapes, width: int) -> dict[str, Any]:
    num_tokens, hidden = shapes["token_embedding.weight"]
    return sdxl_config.CLIP_G | {
        "vocab_size": num_tokens,
        "max_position_embeddings": shapes["positional_embedding"][0],
        "hidden_size": hidden,
        "intermediate_size": shapes["transformer.resblocks.0.mlp.c_fc.weight"][0],
        "num_hidden_layers": _count(shapes, "transformer.resblocks."),
        "num_attention_heads": hidden // width,
        "projection_dim": shapes["text_projection"][1],
    }


def _below(shapes: Shapes, prefix: str) -> dict[str, Sequence[int]]:
    return {
        name.removeprefix(prefix): shape
        for name, shape in shapes.items()
        if name.startswith(prefix)
    }


def _count(shapes: Shapes, beginning: str) -> int:
    """How many different numbers follow `beginning` in the names."""
    return len(
        {name[len(beginning) :].split(".")[0] for name in shapes if name.startswith(beginning)}
    )
