"""The embedded teacher's structure with random weights, for tests of everything around it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from dmd2_core import VPSchedule
from train_lora.demo import architecture
from train_lora.models.components import Components
from train_lora.models.fingerprint import unet_hash
from train_lora.models.text import Condition, size_ids
from train_lora.models.tokenizer import build_tokenizers


@pytest.fixture(scope="session")
def shared_components() -> Components:
    """The tiny model, for tests that only read it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet, vae = architecture.build_unet(), architecture.build_vae()
        encoders = list(architecture.build_text_encoders())
        for network in (unet, vae, *encoders):
            network.requires_grad_(False).eval()
            for name, weight in network.named_parameters():
                if "norm" in name or name.endswith("bias"):  # 1 and 0 would hide a mix-up
                    weight.add_(torch.randn_like(weight), alpha=0.1)
    return Components(
        unet=unet,
        vae=vae,
        text_encoders=encoders,
        tokenizers=build_tokenizers(),
        schedule=VPSchedule.sdxl(),
        prediction="epsilon",
        base_hash=unet_hash(unet),
        name="tiny",
    )


@pytest.fixture
def components(shared_components: Components) -> Components:
    """The tiny model; its UNet may be changed, the rest is shared by all tests."""
    unet = copy.deepcopy(shared_components.unet)
    fields = {
        name: getattr(shared_components, name) for name in shared_components.__dataclass_fields__
    }
    return Components(**(fields | {"unet": unet}))


@pytest.fixture
def make_inputs() -> Callable[..., tuple[torch.Tensor, torch.Tensor, Condition]]:
    """(x_t, t, condition) for the tiny UNet, the same numbers for the same seed."""

    def make(num: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Condition]:
        generator = torch.Generator().manual_seed(seed)
        condition = Condition(
            hidden=torch.randn(num, 77, 96, generator=generator),
            pooled=torch.randn(num, 64, generator=generator),
            time_ids=size_ids(num, 128, 128),
        )
        x_t = torch.randn(num, 4, 16, 16, generator=generator)
        return x_t, torch.arange(100, 100 + 300 * num, 300), condition

    return make
