"""What exported files tell other programs and people."""

from __future__ import annotations

import base64
import copy
import hashlib
import io
import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from dmd2_core import Recipe
from train_lora.export import export_lora
from train_lora.lora_metadata import usage_hint
from train_lora.models.roles import STUDENT, LoraSpec, SharedUNet
from train_lora.pictures import jpeg_data_url

RECIPE = Recipe(
    timesteps=(999, 749, 499, 249),
    prediction="v",
    zero_terminal_snr=True,
    base_model="noob",
    base_model_hash="ab12",
    trained_with={
        "training": {"iterations": 7, "batch_size": 2, "seed": 5, "optimizer": "adamw8bit"},
        "student": {"learning_rate": 0.0001},
    },
)


@pytest.fixture(scope="module")
def student(shared_components) -> SharedUNet:
    unet = copy.deepcopy(shared_components.unet)
    return SharedUNet(unet, {STUDENT: LoraSpec(rank=2, alpha=1.0)}, seed=1)


def written(student, path, **options):
    export_lora(student, STUDENT, path, RECIPE, **options)
    with safe_open(path, framework="pt") as file:
        return file.metadata()


def test_modelspec_and_sd_scripts_essentials(student, tmp_path):
    found = written(student, tmp_path / "l.safetensors", side_px=832)
    assert found["modelspec.sai_model_spec"] == "1.0.1"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert found["modelspec.title"] == "noob, DMD2 in 4 steps"
    assert found["modelspec.prediction_type"] == "v"
    assert found["modelspec.resolution"] == "832x832"
    assert "ab12" in found["modelspec.description"]
    assert found["ss_sd_model_name"] == "noob"
    assert found["ss_zero_terminal_snr"] == "True"
    assert (found["ss_network_dim"], found["ss_network_alpha"]) == ("2", "1.0")
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "1.0"}
    assert (found["ss_max_train_steps"], found["ss_seed"]) == ("7", "5")
    assert (found["ss_optimizer"], found["ss_unet_lr"]) == ("adamw8bit", "0.0001")
    assert not any("date" in key or "time" in key for key in found)


def test_the_hashes_are_of_the_files_tensor_bytes(student, tmp_path):
    """As A1111 (sshs_model_hash) and sai_model_spec (hash_sha256) define them."""
    path = tmp_path / "l.safetensors"
    found = written(student, path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    expected = hashlib.sha256(content[start:]).hexdigest()
    assert found["sshs_model_hash"] == expected
    assert found["modelspec.hash_sha256"] == "0x" + expected


def test_the_thumbnail_is_a_small_jpeg_that_shows_the_picture(student, tmp_path):
    image = torch.full((3, 512, 384), -1.0)
    image[0] = 1.0  # red
    url = jpeg_data_url(image, 256)
    found = written(student, tmp_path / "l.safetensors", thumbnail=url)["modelspec.thumbnail"]
    kind, _, data = found.partition(",")
    assert kind == "data:image/jpeg;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (picture.format, picture.size) == ("JPEG", (192, 256))
    red, green, blue = picture.getpixel((96, 128))
    assert red > 240
    assert max(green, blue) < 15
    assert "modelspec.thumbnail" not in written(student, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            Recipe(timesteps=(999, 749, 499, 249)),
            "4 steps, CFG 1 (a negative prompt acts through NAG only), sampler lcm, "
            "scheduler simple, LoRA strength 1",
        ),
        (RECIPE, "scheduler simple, LoRA strength 1, the base model predicts v with zero terminal"),
        (Recipe(timesteps=(999, 600)), "2 steps, CFG 1 (a negative prompt acts through NAG only), "
         "sampler lcm, timesteps 999, 600"),
        (Recipe(timesteps=(999,), conditioning_timestep=399), "must be told timestep 399"),
    ],
)  # fmt: skip
def test_recommended_settings_in_words(recipe, words):
    assert words in usage_hint(recipe)
