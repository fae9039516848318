"""Every form in which few-step LoRAs are published is read as the same network."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dmd2_core import Recipe
from train_lora.export import export_lora, load_lora_into, read_lora
from train_lora.models.names import kohya_name, kohya_names, unet_names
from train_lora.models.names import renamed as ldm_name
from train_lora.models.roles import STUDENT, LoraSpec, SharedUNet

RANK, ALPHA = 2, 1.0


@pytest.fixture(scope="module")
def student(shared_components) -> SharedUNet:
    shared = SharedUNet(
        copy.deepcopy(shared_components.unet), {STUDENT: LoraSpec(rank=RANK, alpha=ALPHA)}, seed=1
    )
    generator = torch.Generator().manual_seed(1)
    for weight in shared.parameters_of(STUDENT):
        weight.data.normal_(std=0.1, generator=generator)
    return shared


@pytest.fixture(scope="module")
def other(shared_components) -> SharedUNet:
    unet = copy.deepcopy(shared_components.unet)
    return SharedUNet(unet, {STUDENT: LoraSpec(rank=RANK, alpha=ALPHA)}, seed=9)


def tensors_of(student, down_name, up_name, alpha_name=None, factor=1.0):
    tensors = {}
    for module, down, up in student.pairs_of(STUDENT):
        tensors[down_name(module)] = down.detach().clone()
        tensors[up_name(module)] = up.detach() * factor
        if alpha_name:
            tensors[alpha_name(module)] = torch.tensor(ALPHA)
    return tensors


def attention_processor_name(module, side):
    """diffusers 0.1x: "attn1.processor.to_out_lora.up.weight"; elsewhere "proj_in.lora.up"."""
    if ".attn" in module and ".to_" in module:
        head, _, end = module.removesuffix(".0").rpartition(".")
        return f"unet.{head}.processor.{end}_lora.{side}.weight"
    return f"unet.{module}.lora.{side}.weight"


def write(form, student, path):
    names = unet_names(student.unet.config)
    sd_scripts = kohya_names(student.modules_with_adapter, student.unet.config)
    scale = ALPHA / RANK
    metadata = {}
    if form == "sd-scripts":
        tensors = tensors_of(
            student,
            lambda m: sd_scripts[m] + ".lora_down.weight",
            lambda m: sd_scripts[m] + ".lora_up.weight",
            lambda m: sd_scripts[m] + ".alpha",
        )
    elif form == "kohya prefix, diffusers modules":  # as the published DMD2 LoRA
        tensors = tensors_of(
            student,
            lambda m: kohya_name(m) + ".lora_down.weight",
            lambda m: kohya_name(m) + ".lora_up.weight",
            lambda m: kohya_name(m) + ".alpha",
        )
    elif form == "diffusers with alpha in the metadata":
        tensors = tensors_of(
            student, "unet.{}.lora_A.weight".format, "unet.{}.lora_B.weight".format
        )
        metadata["lora_adapter_metadata"] = json.dumps({"unet.r": RANK, "unet.lora_alpha": ALPHA})
    elif form == "diffusers without alpha":
        tensors = tensors_of(
            student, "unet.{}.lora_A.weight".format, "unet.{}.lora_B.weight".format, factor=scale
        )
    elif form == "peft with its config":
        tensors = tensors_of(
            student,
            "base_model.model.{}.lora_A.default.weight".format,
            "base_model.model.{}.lora_B.default.weight".format,
        )
        config = {
            "lora_alpha": 7.0,
            "alpha_pattern": dict.fromkeys(student.modules_with_adapter, ALPHA),
        }
        (path.parent / "adapter_config.json").write_text(json.dumps(config))
    elif form == "old diffusers":
        tensors = tensors_of(
            student,
            lambda m: attention_processor_name(m, "down"),
            lambda m: attention_processor_name(m, "up"),
            factor=scale,
        )
    else:
        assert form == "ComfyUI's model names"
        tensors = tensors_of(
            student,
            lambda m: f"diffusion_model.{ldm_name(m, names)}.lora_down.weight",
            lambda m: f"diffusion_model.{ldm_name(m, names)}.lora_up.weight",
            lambda m: f"diffusion_model.{ldm_name(m, names)}.alpha",
        )
    save_file(tensors, path, metadata=metadata)


FORMS = [
    "sd-scripts",
    "kohya prefix, diffusers modules",
    "diffusers with alpha in the metadata",
    "diffusers without alpha",
    "peft with its config",
    "old diffusers",
    "ComfyUI's model names",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_adapter(form, student, other, tmp_path):
    write(form, student, tmp_path / "l.safetensors")
    load_lora_into(other, tmp_path / "l.safetensors")
    for found, expected in zip(
        other.parameters_of(STUDENT), student.parameters_of(STUDENT), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("alpha", [2.0, 0.7])
def test_diffusers_names_carry_alpha_in_the_weights_and_come_back(
    components, other, tmp_path, alpha, make_inputs
):
    shared = SharedUNet(components.unet, {STUDENT: LoraSpec(rank=RANK, alpha=alpha)}, seed=1)
    for weight in shared.parameters_of(STUDENT):
        weight.data.normal_(std=0.1, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "l.safetensors"
    recipe = Recipe(timesteps=(999,))
    export_lora(shared, STUDENT, path, recipe, dtype=torch.float32, names="diffusers")
    tensors = load_file(path)
    assert len(tensors) == 2 * 129
    assert "unet.mid_block.attentions.0.proj_in.lora_A.weight" in tensors
    assert not any(name.endswith("alpha") for name in tensors)
    read = load_lora_into(other, path)
    assert (read.lora_rank, read.lora_alpha) == (RANK, RANK)  # what the file says now
    with torch.no_grad(), shared.role(STUDENT), other.role(STUDENT):
        torch.testing.assert_close(other(*make_inputs()), shared(*make_inputs()), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"lora_te1_x.lora_down.weight": (1, 1)}, "1 tensors for text encoders, which are not tr"),
        ({"text_encoder.x.lora_A.weight": (1, 1)}, "tensors for text encoders"),
        ({"unet.x.lora_A.weight": (1, 1)}, "no lora_unet_x.lora_up.weight"),
        (
            {
                "base_model.model.x.lora_A.weight": (1, 1),
                "base_model.model.x.lora_B.weight": (1, 1),
            },
            "does not say its alpha",
        ),
        ({"lora_unet_x.hada_w1_a": (1, 1)}, r"not a plain LoRA \(it has no .lora_down"),
        (
            {
                "unet.x.lora_A.weight": (1, 1),
                "unet.x.lora_B.weight": (1, 1),
                "unet.x.lora_magnitude_vector": (1,),
            },
            "it holds unet.x.lora_magnitude_vector",
        ),
    ],
)
def test_what_is_not_a_plain_lora_of_a_unet_is_refused(tmp_path, tensors, message):
    path = tmp_path / "l.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in tensors.items()}, path)
    with pytest.raises(ValueError, match=message) as caught:
        read_lora(path)
    assert str(path) in str(caught.value)
