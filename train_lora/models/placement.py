"""Which network is on the GPU when: encoders leave it once their work is cached."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .components import Components


def place(components: Components, device: torch.device) -> None:
    """Every network to `device`, for work that needs all of them at once."""
    components.unet.to(device)
    place_encoders(components, device)


def place_encoders(components: Components, device: torch.device) -> None:
    """VAE and text encoders to `device`, before captions and images are encoded there."""
    for network in (components.vae, *components.text_encoders):
        network.to(device)


def release_encoders(components: Components, *, text: bool) -> None:
    """The VAE off the GPU, and the text encoders too unless they encode during training.

    The VAE comes back for each picture by itself (`placed`).
    """
    for network in (components.vae, *(components.text_encoders if text else ())):
        network.to("cpu")
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@contextmanager
def placed(network: nn.Module, device: torch.device) -> Iterator[None]:
    """`network` on `device` inside the block, and where it was again after it."""
    before = next(network.parameters()).device
    try:
        network.to(device)
        yield
    finally:
        network.to(before)
