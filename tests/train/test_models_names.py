"""Our one map of names against diffusers' own converter, small and at SDXL's real size."""

from __future__ import annotations

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dmd2_core import VPSchedule
from train_lora.demo import architecture
from train_lora.models import sdxl_config
from train_lora.models.components import Components
from train_lora.models.convert import components_to_file, unet_to_file
from train_lora.models.infer import infer_configs
from train_lora.models.names import UNET_PREFIX, kohya_names
from train_lora.models.roles import TARGETS


def meta_components(
    unet: dict, vae: dict, clip_l: dict, clip_g: dict, num_params: int
) -> Components:
    """Networks without memory."""
    with init_empty_weights():
        components = Components(
            unet=UNet2DConditionModel(**unet),
            vae=AutoencoderKL(**vae),
            text_encoders=[
                CLIPTextModel(CLIPTextConfig(**clip_l)),
                CLIPTextModelWithProjection(CLIPTextConfig(**clip_g)),
            ],
            tokenizers=[],
            schedule=VPSchedule.sdxl(),
            prediction="epsilon",
            base_hash="",
            name="",
        )
    assert components.unet.num_parameters() == num_params
    return components


def sdxl() -> Components:
    return meta_components(
        sdxl_config.UNET,
        sdxl_config.VAE,
        sdxl_config.CLIP_L,
        sdxl_config.CLIP_G,
        num_params=2_567_463_684,  # stable-diffusion-xl-base-1.0's UNet
    )


def tiny() -> Components:
    return meta_components(
        architecture.UNET_CONFIG,
        architecture.VAE_CONFIG,
        architecture.CLIP_L_CONFIG,
        architecture.CLIP_G_CONFIG,
        num_params=2_984_260,
    )


def check_unet_and_vae_against_diffusers(components: Components) -> None:
    config, state = components.unet.config, components.unet.state_dict()
    file = {UNET_PREFIX + name: tensor for name, tensor in unet_to_file(state, config).items()}
    converted = convert_ldm_unet_checkpoint(file, config)
    assert converted.keys() == state.keys()
    assert all(converted[name] is state[name] for name in state)  # the very same tensors
    vae, file = components.vae.state_dict(), components_to_file(components)
    converted = convert_ldm_vae_checkpoint(file, components.vae.config)
    assert {name: t.shape for name, t in converted.items()} == {n: t.shape for n, t in vae.items()}


def test_every_name_of_the_tiny_model_is_what_diffusers_reads():
    check_unet_and_vae_against_diffusers(tiny())


def test_every_name_of_sdxl_is_what_diffusers_reads():
    check_unet_and_vae_against_diffusers(sdxl())


def test_sdxls_configs_are_read_off_its_shapes():
    file = components_to_file(sdxl())
    assert (
        len(file) == 1680 + 248 + 196 + 389
    )  # the base file's 2515 but position ids and logit scale
    shapes = {name: tuple(tensor.shape) for name, tensor in file.items()}
    configs = infer_configs(shapes, "sdxl", resolution_px=1024)
    assert configs == {
        "unet": sdxl_config.UNET,
        "vae": sdxl_config.VAE,
        "clip_l": sdxl_config.CLIP_L,
        "clip_g": sdxl_config.CLIP_G,
    }


def test_the_tiny_configs_are_read_off_its_shapes():
    shapes = {name: tuple(t.shape) for name, t in components_to_file(tiny()).items()}
    configs = infer_configs(shapes, "sdxl", resolution_px=128)
    expected = {
        "unet": architecture.UNET_CONFIG,
        "vae": architecture.VAE_CONFIG,
        "clip_l": architecture.CLIP_L_CONFIG,
        "clip_g": architecture.CLIP_G_CONFIG,
    }
    for part, config in expected.items():
        assert {key: configs[part][key] for key in config} == config


def test_sdxls_lora_names_are_788_different_ones():
    unet = sdxl().unet
    modules = [
        name
        for name, module in unet.named_modules()
        if any(name.endswith("." + target) for target in TARGETS) and hasattr(module, "weight")
    ]
    names = kohya_names(modules, unet.config)
    assert len(modules) == len(set(names.values())) == 788
    # Known pairs, from published SDXL LoRAs in both forms.
    assert (
        names["down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"]
        == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    )
    assert names["down_blocks.0.downsamplers.0.conv"] == "lora_unet_input_blocks_3_0_op"
    assert names["mid_block.resnets.1.time_emb_proj"] == "lora_unet_middle_block_2_emb_layers_1"
    assert names["up_blocks.0.upsamplers.0.conv"] == "lora_unet_output_blocks_2_2_conv"
    assert names["up_blocks.2.resnets.2.conv_shortcut"] == (
        "lora_unet_output_blocks_8_0_skip_connection"
    )
