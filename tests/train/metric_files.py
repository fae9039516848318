"""Weights of metrics' networks, random but of the true form, written as users have them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
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
