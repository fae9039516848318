"""The files of `regression.loss`: each form is read, others are refused, missing ones are told."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from train_lora import cli
from train_lora.inputs import check_inputs
from train_lora.metrics.latent_lpips import load_latent_lpips
from train_lora.models.components import Components
from train_lora.models.tiny_vae import load_tiny_vae
from train_lora.regression_losses import regression_loss_of

from .metric_files import alexnet_file, latent_lpips_file, tiny_vae_folder
from .test_regression import STAGES
from .tiny import demo_config

CPU = torch.device("cpu")


def test_tiny_vaes_are_read_in_each_of_their_forms(tmp_path: Path) -> None:
    """diffusers' folder and its file, and the author's decoder: all as diffusers decodes."""
    from diffusers import AutoencoderTiny

    x0 = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    folder = tiny_vae_folder(tmp_path / "folder")
    whole = AutoencoderTiny.from_pretrained(folder)
    with torch.no_grad():
        expected = whole.decode(x0).sample
        for path in (folder, folder / "diffusion_pytorch_model.safetensors"):
            vae = load_tiny_vae(path, channels=4)
            assert torch.equal(vae.decode(x0).sample, expected)
            assert not any(p.requires_grad for p in vae.parameters())
        whole = AutoencoderTiny()  # of the published sizes, which the author's files have
        parts = ((n.split("."), t) for n, t in whole.decoder.state_dict().items())
        author = tmp_path / "taesdxl_decoder.safetensors"
        save_file({".".join([str(int(n[1]) + 1), *n[2:]]): t.clone() for n, t in parts}, author)
        vae = load_tiny_vae(author, channels=4)
        assert torch.equal(vae.decode(x0).sample, whole.decode(x0).sample)


def test_what_is_no_tiny_vae_is_refused(tmp_path: Path, shared_components: Components) -> None:
    shared_components.vae.save_pretrained(tmp_path / "large")
    empty, foreign = tmp_path / "empty", tmp_path / "foreign.safetensors"
    empty.mkdir()
    save_file({"weight": torch.zeros(1)}, foreign)
    tiny_vae_folder(tmp_path / "sixteen", channels=16)
    for path, message in (
        (tmp_path / "large", r"large' is a AutoencoderKL, not an AutoencoderTiny; name one, or"),
        (empty, r"empty', which is neither a .safetensors file nor a folder with diffusion_pytor"),
        (foreign, r"does not hold the decoder of an AutoencoderTiny"),
        (tmp_path / "sixteen", r"decodes latents of 16 channels, the model's have 4; name the one"),
    ):
        with pytest.raises(ValueError, match=message):
            load_tiny_vae(path, channels=4)


def test_what_is_no_latent_lpips_is_refused(tmp_path: Path, shared_components: Components) -> None:
    good = torch.load(latent_lpips_file(tmp_path), weights_only=True)
    half = {n: t for n, t in good.items() if ".27." not in n}
    wide = good | {"lin2.model.1.weight": torch.zeros(1, 5, 1, 1)}
    for weights, message in (
        (
            {"features.0.weight": torch.zeros(1)},
            r"is no file of elatentlpips, .*; get it from there",
        ),
        (half, r"lacks layer 27 of a VGG16"),
        (wide, r"weighs 5 channels where its network has 12"),
        (good | {"net.slice1.1.extra": torch.zeros(1)}, r"holds another network \(Unexpected key"),
    ):
        torch.save(weights, tmp_path / "file.pth")
        with pytest.raises(ValueError, match=message):
            load_latent_lpips(tmp_path / "file.pth", "option", "there")
    flux = latent_lpips_file(tmp_path, channels=16)
    config = demo_config(
        tmp_path, **STAGES, regression__loss="latent-lpips", regression__lpips_weights=flux
    )
    with pytest.raises(
        ValueError, match=r"latents of 16 channels, the model's have 4; name the fi"
    ):
        regression_loss_of(config, shared_components, CPU)


def test_missing_networks_end_as_one_sentence_that_says_where_to_get_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pairs").mkdir()
    options = STAGES | {
        "regression__pairs": tmp_path / "pairs",
        "output__directory": tmp_path / "r",
    }

    def said(**more: Any) -> str:
        argv = [f"--{k.replace('__', '.')}={v}" for k, v in (options | more).items()]
        assert cli.main(["train", "--preset", "demo", *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    line = said(regression__loss="lpips")
    assert 'regression.lpips_weights is not set, but regression.loss is "lpips"' in line
    assert "get https://download.pytorch.org/models/vgg16-397923af.pth" in line
    gone = tmp_path / "gone.pth"
    line = said(regression__loss="lpips", regression__lpips_weights=gone)
    assert (
        f"regression.lpips_weights is '{gone}', which does not exist, and nothing is downl" in line
    )
    assert "get it from https://download.pytorch.org/models/vgg16-397923af.pth" in line
    line = said(regression__loss="latent-lpips", regression__lpips_weights=gone)
    assert "https://huggingface.co/Mingguksky/elatentlpips" in line
    there = alexnet_file(tmp_path)
    pixels = {"regression__loss": "lpips", "regression__lpips_weights": there}
    line = said(**pixels, regression__tiny_vae=tmp_path / "taesdxl")
    assert "get it from https://huggingface.co/madebyollin/taesdxl" in line
    line = said(**pixels | {"regression__loss": "latent-lpips"}, regression__tiny_vae=there)
    assert "tiny_vae is" in line
    assert "but has no effect, because regression.loss is 'latent-lpips'" in line
    line = said(regression__lpips_weights=there)
    assert "no effect, because regression.loss is 'mse'" in line
    assert not (tmp_path / "r").exists()


def test_a_recipe_tells_no_folder(tmp_path: Path) -> None:
    config = demo_config(
        tmp_path,
        **STAGES,
        regression__loss="lpips",
        regression__lpips_weights=alexnet_file(tmp_path),
        regression__tiny_vae=tiny_vae_folder(tmp_path / "tiny"),
    )
    told = config.recipe_settings()["regression"]
    assert told["lpips_weights"] == "alexnet.pth"
    assert told["tiny_vae"] == "tiny"
    there = replace(config.regression, pairs=str(tmp_path))
    check_inputs(replace(config, regression=there), warm=True)
