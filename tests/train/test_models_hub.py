"""Hub ids: only when named, announced, from the cache without network, clear without either."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from train_lora.models import hub
from train_lora.models.hub import wanted_files
from train_lora.models.loading import load_components
from train_lora.models.places import is_hub_id
from train_lora.models.saving import save_diffusers_folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", True),
        ("org/name", True),
        ("model", False),
        ("/abs/model", False),
        ("./org/name", False),
        ("../model", False),
        ("a/b/c", False),
        ("models/noob.safetensors", False),
        ("models/old.ckpt", False),
        ("org/", False),
    ],
)
def test_what_reads_like_a_hub_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) == expected


def test_an_existing_path_is_never_looked_up(components, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_diffusers_folder(components, Path("org/name"))
    monkeypatch.setattr(hub, "snapshot", lambda name: pytest.fail("the hub was asked"))
    assert load_components("org/name").base_hash == components.base_hash


def test_without_network_and_cache_it_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"org/nothing is not an existing path and cannot be had"):
        load_components("org/nothing")


def test_a_cached_model_loads_without_network(components, tmp_path: Path, monkeypatch) -> None:
    """The real cache layout; offline mode is on in every test."""
    repository = tmp_path / "models--org--name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    save_diffusers_folder(components, repository / "snapshots" / ("0" * 40))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_components("org/name")
    assert loaded.name == "name"
    assert loaded.base_hash == components.base_hash
    assert torch.equal(loaded.unet.conv_in.weight, components.unet.conv_in.weight)


def test_only_the_parts_that_are_used_are_wanted() -> None:
    names = [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/model.onnx",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "sd_xl_base_1.0.safetensors",
    ]
    assert wanted_files(names) == [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/model.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert wanted_files(["README.md", "noob.safetensors", "unet/config.json"]) == []
