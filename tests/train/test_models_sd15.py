"""SD1.5 by the same code: both forms, its conditioning, its LoRA names, its training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator, init_empty_weights
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
)
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel

from dmd2_core import Recipe, VPSchedule
from train_lora.distill import StudentSample
from train_lora.export import export_lora, load_lora_into, read_lora
from train_lora.matching import matching_gradient
from train_lora.models import sd15_config
from train_lora.models.components import Components
from train_lora.models.convert import components_to_file, unet_to_file
from train_lora.models.infer import infer_configs
from train_lora.models.loading import load_components
from train_lora.models.names import UNET_PREFIX, kohya_names, ldm_lora_names
from train_lora.models.roles import STUDENT, LoraSpec, SharedUNet
from train_lora.models.saving import save_diffusers_folder, save_single_file
from train_lora.models.text import encode_prompts
from train_lora.trainer import build_trainer

from .tiny import demo_config
from .tiny_sd15 import random_sd15, sd15_condition, sd15_data


@pytest.fixture(scope="module")
def shared() -> Components:
    return random_sd15()


@pytest.fixture
def model() -> Components:
    return random_sd15()


@pytest.fixture(scope="module")
def file(shared: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sd15") / "model.safetensors"
    save_single_file(shared, path, dtype=torch.float32)
    return path


def unet_output(components: Components) -> torch.Tensor:
    condition = sd15_condition(2, torch.Generator().manual_seed(1))
    x_t = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        return components.unet(x_t, torch.tensor([10, 700]), condition.hidden).sample


def assert_same_model(loaded: Components, expected: Components) -> None:
    assert (loaded.kind, loaded.prediction) == ("sd15", "epsilon")
    assert loaded.base_hash == expected.base_hash
    assert len(loaded.text_encoders) == len(loaded.tokenizers) == 1
    assert loaded.vae.config.scaling_factor == 0.18215
    assert torch.equal(unet_output(loaded), unet_output(expected))
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert torch.equal(loaded.vae.decode(latents).sample, expected.vae.decode(latents).sample)
    captions = ["a red ring", ""]
    one, other = (encode_prompts(c, captions, 256, 256) for c in (loaded, expected))
    assert torch.equal(one.hidden, other.hidden)
    assert torch.equal(loaded.empty_prompt, expected.empty_prompt)


def test_single_file_round_trip(file: Path, shared: Components) -> None:
    assert any(
        name.startswith("cond_stage_model.transformer.text_model.") for name in load_file(file)
    )
    assert_same_model(load_components(file), shared)


def test_folder_round_trip(shared: Components, tmp_path: Path) -> None:
    save_diffusers_folder(shared, tmp_path / "model")
    assert_same_model(load_components(tmp_path / "model"), shared)


def test_files_that_leave_out_text_model_are_read(
    file: Path, shared: Components, tmp_path: Path
) -> None:
    tensors = {
        name.replace("transformer.text_model.", "transformer."): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, tmp_path / "short.safetensors")
    assert_same_model(load_components(tmp_path / "short.safetensors"), shared)


def test_every_name_and_config_of_the_real_size_is_diffusers() -> None:
    """Names against diffusers' converter, configs read off the shapes, the known size."""
    with init_empty_weights():
        components = Components(
            unet=UNet2DConditionModel(**sd15_config.UNET),
            vae=AutoencoderKL(**sd15_config.VAE),
            text_encoders=[CLIPTextModel(CLIPTextConfig(**sd15_config.CLIP_L))],
            tokenizers=[],
            schedule=VPSchedule.sd15(),
            prediction="epsilon",
            kind="sd15",
            base_hash="",
            name="",
            empty_prompt=torch.zeros(1, 77, 768),
        )
    assert components.unet.num_parameters() == 859_520_964  # stable-diffusion-v1-5's UNet
    config, state = components.unet.config, components.unet.state_dict()
    named = {UNET_PREFIX + name: tensor for name, tensor in unet_to_file(state, config).items()}
    converted = convert_ldm_unet_checkpoint(named, config)
    assert all(converted[name] is state[name] for name in state)
    tensors = components_to_file(components)
    vae = components.vae.state_dict()
    found = convert_ldm_vae_checkpoint(dict(tensors), components.vae.config)
    assert {name: t.shape for name, t in found.items()} == {n: t.shape for n, t in vae.items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    configs = infer_configs(shapes, "sd15", resolution_px=512)
    assert configs == {
        "unet": sd15_config.UNET,
        "vae": sd15_config.VAE,
        "clip_l": sd15_config.CLIP_L,
    }


def test_encoding_equals_diffusers_pipeline(shared: Components) -> None:
    captions = ["a red ring on a blue background", "two cats"]
    condition = encode_prompts(shared, captions, height_px=256, width_px=192)
    pipeline = StableDiffusionPipeline(
        vae=shared.vae,
        text_encoder=shared.text_encoders[0],
        tokenizer=shared.tokenizers[0],
        unet=shared.unet,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    hidden, empty = pipeline.encode_prompt(captions, "cpu", 1, True)
    assert torch.equal(condition.hidden, hidden)
    unconditional = shared.unconditional(condition)
    assert torch.equal(unconditional.hidden, empty)  # the encoded empty caption, not zeros
    assert condition.latent_shape() == (2, 4, 32, 24)


def trained(components: Components) -> SharedUNet:
    unet = SharedUNet(components.unet, {STUDENT: LoraSpec(rank=2, alpha=1)}, seed=1)
    generator = torch.Generator().manual_seed(1)
    for weight in unet.parameters_of(STUDENT):
        weight.data.normal_(std=0.1, generator=generator)
    return unet


def test_loras_have_sd_scripts_names_and_diffusers_applies_every_module(
    model: Components, shared: Components, tmp_path: Path
) -> None:
    unet, path = trained(model), tmp_path / "l.safetensors"
    export_lora(unet, STUDENT, path, Recipe(timesteps=(999,)), dtype=torch.float32)
    tensors = load_file(path)
    assert "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight" in tensors
    assert "lora_unet_up_blocks_0_upsamplers_0_conv.alpha" in tensors
    base = random_sd15().unet
    pipeline = StableDiffusionPipeline(
        vae=shared.vae,
        text_encoder=None,
        tokenizer=None,
        unet=base,
        scheduler=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(str(path))
    layers = [module for module in base.modules() if isinstance(module, LoraLayer)]
    assert len(layers) == len(unet.modules_with_adapter)
    condition = sd15_condition(2, torch.Generator().manual_seed(1))
    x_t = torch.randn(2, 4, 32, 32, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([10, 700])
    with torch.no_grad(), unet.role(STUDENT):
        expected = unet(x_t, t, condition)
        found = base(x_t, t, condition.hidden).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("names", [kohya_names, ldm_lora_names])
def test_both_kinds_of_module_names_are_read(model: Components, tmp_path: Path, names) -> None:
    unet = trained(model)
    by_name = names(unet.modules_with_adapter, model.unet.config)
    tensors = {}
    for module, down, up in unet.pairs_of(STUDENT):
        tensors[by_name[module] + ".lora_down.weight"] = down.detach()
        tensors[by_name[module] + ".lora_up.weight"] = up.detach()
        tensors[by_name[module] + ".alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "l.safetensors")
    other = SharedUNet(random_sd15().unet, {STUDENT: LoraSpec(rank=2, alpha=1)}, seed=5)
    load_lora_into(other, tmp_path / "l.safetensors")
    assert all(map(torch.equal, other.parameters_of(STUDENT), unet.parameters_of(STUDENT)))


def test_it_trains_with_every_loss_and_exports(model: Components, tmp_path: Path) -> None:
    config = demo_config(
        tmp_path / "run",
        data__resolution_px=256,
        data__real_images="folder",
        training__batch_size=1,
        student__rank=2,
        critic__rank=2,
        validation__every=0,
    )
    trainer = build_trainer(config, model, sd15_data(), Accelerator(cpu=True))
    assert trainer.distiller.unet.layers["middle"].downscale == 8
    before = [p.detach().clone() for p in trainer.distiller.unet.parameters_of(STUDENT)]
    figures = trainer.iterate(0)
    assert {"loss/matching", "loss/gan_generator", "loss/critic", "loss/gan_critic"} <= set(figures)
    assert all(torch.isfinite(value).all() for value in figures.values())
    after = trainer.distiller.unet.parameters_of(STUDENT)
    assert not any(map(torch.equal, before, after))
    trainer.export(tmp_path / "lora.safetensors")
    modules, recipe = read_lora(tmp_path / "lora.safetensors")
    assert len(modules) == len(trainer.distiller.unet.modules_with_adapter)
    assert recipe is not None
    assert recipe.base_model == "tiny15"


def test_the_teachers_guidance_starts_from_the_encoded_empty_caption(
    model: Components, tmp_path: Path
) -> None:
    """With the wrong (zero) unconditional branch the matching gradient would be another."""
    config = demo_config(
        tmp_path / "run", data__resolution_px=256, data__real_images="folder", student__rank=2
    )
    trainer = build_trainer(config, model, sd15_data(), Accelerator(cpu=True))
    distiller, condition = trainer.distiller, sd15_condition(1, torch.Generator().manual_seed(4))
    seen = []
    hook = distiller.unet.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    x = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(4))
    sample = StudentSample(x0=x, condition=condition, timestep=999)
    matching_gradient(distiller, sample, [torch.Generator().manual_seed(4)])
    hook.remove()
    rows = torch.cat(seen)
    assert any(torch.equal(row, model.empty_prompt[0]) for row in rows)
    assert all(row.abs().max() > 0 for row in rows)
