"""diffusers' module names <-> those of a single file (LDM, open_clip): one map for all uses.

Checkpoints are loaded and saved, base models hashed and LoRAs exported through these tables. Names
go from diffusers to the file; the other direction is a look-up among a network's own names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .components import Kind

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_L_PREFIX = "conditioner.embedders.0.transformer.text_model."
CLIP_G_PREFIX = "conditioner.embedders.1.model."
SD15_CLIP_PREFIX = "cond_stage_model.transformer.text_model."

_UNET_ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "mid_block.attentions.0": "middle_block.1",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_CLIP_G_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def unet_names(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers -> LDM beginnings of names, for a UNet of this config.

    LDM numbers the encoder's stages (a resnet with its attention, or a downsampling) in one row,
    the decoder's likewise; an upsampling belongs to its level's last stage.
    """
    names = dict(_UNET_ENDS)

    def add_resnet(name: str, ldm: str) -> None:
        names.update({f"{name}.{end}": f"{ldm}.{ldm_end}" for end, ldm_end in _UNET_RESNET.items()})

    num_levels, num_layers = len(config["block_out_channels"]), config["layers_per_block"]
    stage = 1  # 0 is conv_in
    for level in range(num_levels):
        for layer in range(num_layers):
            add_resnet(f"down_blocks.{level}.resnets.{layer}", f"input_blocks.{stage}.0")
            names[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{stage}.1"
            stage += 1
        if level < num_levels - 1:
            names[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{stage}.0.op"
            stage += 1
    add_resnet("mid_block.resnets.0", "middle_block.0")
    add_resnet("mid_block.resnets.1", "middle_block.2")
    stage = 0
    for level, kind in enumerate(config["up_block_types"]):
        for layer in range(num_layers + 1):
            add_resnet(f"up_blocks.{level}.resnets.{layer}", f"output_blocks.{stage}.0")
            names[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{stage}.1"
            stage += 1
        place = 2 if "CrossAttn" in kind else 1
        names[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{stage - 1}.{place}.conv"
    return names


def vae_names(config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers -> LDM beginnings of names, for an AutoencoderKL of this config.

    The decoder's levels are numbered from the picture in LDM, from the latents in diffusers.
    """
    names: dict[str, str] = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    num_levels, num_layers = len(config["block_out_channels"]), config["layers_per_block"]
    for half, block, sampler, extra in (
        ("encoder", "down_blocks", "downsample", 0),
        ("decoder", "up_blocks", "upsample", 1),
    ):
        names |= {f"{half}.{end}": f"{half}.{end}" for end in ("conv_in", "conv_out")}
        names[f"{half}.conv_norm_out"] = f"{half}.norm_out"
        for level in range(num_levels):
            ldm_level = num_levels - 1 - level if half == "decoder" else level
            name, ldm = f"{half}.{block}.{level}", f"{half}.{block.split('_')[0]}.{ldm_level}"
            names[f"{name}.{sampler}rs.0.conv"] = f"{ldm}.{sampler}.conv"
            for layer in range(num_layers + extra):
                _add_vae_resnet(names, f"{name}.resnets.{layer}", f"{ldm}.block.{layer}")
        for layer in range(2):
            _add_vae_resnet(
                names, f"{half}.mid_block.resnets.{layer}", f"{half}.mid.block_{layer + 1}"
            )
        for end, ldm_end in _VAE_ATTENTION.items():
            names[f"{half}.mid_block.attentions.0.{end}"] = f"{half}.mid.attn_1.{ldm_end}"
    return names


def _add_vae_resnet(names: dict[str, str], name: str, ldm: str) -> None:
    names |= {f"{name}.{end}": f"{ldm}.{end}" for end in ("norm1", "conv1", "norm2", "conv2")}
    names[f"{name}.conv_shortcut"] = f"{ldm}.nin_shortcut"


def clip_g_names(num_layers: int) -> dict[str, str]:
    """transformers -> open_clip beginnings of names, but for the fused projections of attention."""
    names = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
    }
    for layer in range(num_layers):
        for end, open_clip_end in _CLIP_G_LAYER.items():
            names[f"encoder.layers.{layer}.{end}"] = (
                f"transformer.resblocks.{layer}.{open_clip_end}"
            )
    return names


def renamed(name: str, names: Mapping[str, str]) -> str:
    """`name` with its longest beginning that `names` has (whole words between dots) replaced."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        beginning = ".".join(words[:length])
        if beginning in names:
            return ".".join([names[beginning], *words[length:]])
    raise KeyError(name)


def kohya_name(module: str) -> str:
    """The beginning of an sd-scripts LoRA key, for a module of the UNet."""
    return "lora_unet_" + module.replace(".", "_")


def ldm_lora_names(modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' module names -> `lora_unet_` names made of LDM ones."""
    names = unet_names(config)
    return {module: kohya_name(renamed(module, names)) for module in modules}


def kohya_names(modules: Iterable[str], config: Mapping[str, Any]) -> dict[str, str]:
    """diffusers' module names -> sd-scripts' own: what exported LoRAs are made of.

    sd-scripts names SDXL's modules as LDM does and SD1.5's as diffusers does; A1111, Forge,
    ComfyUI and diffusers expect just that.
    """
    if unet_kind(config) == "sdxl":
        return ldm_lora_names(modules, config)
    return {module: kohya_name(module) for module in modules}


def unet_kind(config: Mapping[str, Any]) -> Kind:
    """Which family a UNet of this config belongs to: only SDXL's is told sizes."""
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd15"
