"""Weights of metrics' networks, random but of the true form, written as users have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from diffusers import AutoencoderTiny
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextConfig,
    CLIPVisionConfig,
)

from train_lora.models.tokenizer import build_tokenizers


def random_picture(seed: int, width: int = 96, height: int = 80) -> Image.Image:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (height * width * 3,), generator=generator, dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), noise.numpy().tobytes())


def alexnet_file(folder: Path) -> Path:
    """torchvision's AlexNet with random weights, its large head cut off."""
    return _classifier_file(folder / "alexnet.pth", "alexnet", lambda shape: 0.05)


def vgg16_file(folder: Path) -> Path:
    """torchvision's VGG16 likewise; its many stages keep the signal's size."""
    return _classifier_file(
        folder / "vgg16.pth", "vgg16", lambda shape: (2 / (shape[1] * 9)) ** 0.5
    )


def _classifier_file(path: Path, name: str, deviation: Callable[[torch.Size], float]) -> Path:
    with torch.random.fork_rng(), torch.device("meta"):
        names = getattr(torchvision.models, name)().features.state_dict()
    generator = torch.Generator().manual_seed(0)
    weights = {
        f"features.{name}": torch.randn(value.shape, generator=generator)
        * (deviation(value.shape) if value.ndim > 1 else 0.1)
        for name, value in names.items()
    }
    torch.save(weights, path)
    return path


def latent_lpips_file(
    folder: Path, channels: int = 4, widths: tuple[int, ...] = (8, 8, 12, 16, 16)
) -> Path:
    """As the elatentlpips project names a LatentLPIPS' tensors; its own widths are VGG16's."""
    path = folder / "sdxl_latest_vgg16_tuned.pth"
    generator = torch.Generator().manual_seed(0)
    places, before = iter((0, 3, 7, 10, 14, 17, 20, 24, 27, 30, 34, 37, 40)), channels
    weights: dict[str, torch.Tensor] = {}
    for number, width in enumerate(widths):
        for _ in range(2 if number < 2 else 3):
            place, stage = next(places), f"net.slice{number + 1}"
            deviation = (2 / (9 * before)) ** 0.5  # keeps the signal's size
            kernel = torch.randn(width, before, 3, 3, generator=generator) * deviation
            weights |= {
                f"{stage}.{place}.weight": kernel,
                f"{stage}.{place}.bias": kernel[:, 0, 0, 0],
            }
            normalisation = {
                "weight": 1 + 0.1 * kernel[:, 0, 0, 1],
                "bias": 0.1 * kernel[:, 0, 0, 2],
                "running_mean": 0.1 * kernel[:, 0, 1, 0],
                "running_var": 1 + 0.1 * kernel[:, 0, 1, 1].abs(),
                "num_batches_tracked": torch.tensor(7),
            }
            weights |= {f"{stage}.{place + 1}.{n}": t for n, t in normalisation.items()}
            before = width
        row = torch.rand(1, width, 1, 1, generator=generator)
        weights |= {f"lin{number}.model.1.weight": row, f"lins.{number}.model.1.weight": row}
    torch.save(weights, path)
    return path


def tiny_vae_folder(folder: Path, channels: int = 4, width: int = 8) -> Path:
    """diffusers' AutoencoderTiny with random weights, as it saves it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderTiny(
            encoder_block_out_channels=(width,) * 4,
            decoder_block_out_channels=(width,) * 4,
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            latent_channels=channels,
        )
        for weight in vae.decoder.parameters():  # else all pictures are nearly one
            weight.data.mul_(2)
    vae.save_pretrained(folder)
    return folder


def clip_folder(folder: Path) -> Path:
    """A tiny CLIP with random weights and everything that a published one has beside it."""
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=49408, eos_token_id=49407, bos_token_id=49406, pad_token_id=49407,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=32, patch_size=8,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
        model = CLIPModel(config)
    model.save_pretrained(folder)
    size = {"shortest_edge": 32}
    images = CLIPImageProcessor(size=size, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, build_tokenizers(1)[0]).save_pretrained(folder)
    return folder
