"""The embedded teacher's structure with random weights, for tests of everything around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch

from train_lora.models.components import Components
from train_lora.models.text import Condition, size_ids

from .tiny import random_components


@pytest.fixture(scope="session")
def shared_components() -> Components:
    """The tiny model, for tests that only read it."""
    return random_components()


@pytest.fixture
def components(shared_components: Components) -> Components:
    """The tiny model; its UNet may be changed, the rest is shared by all tests."""
    unet = copy.deepcopy(shared_components.unet)
    fields = {
        name: getattr(shared_components, name) for name in shared_components.__dataclass_fields__
    }
    return Components(**(fields | {"unet": unet}))


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """For tests that train in bf16: accelerate keeps the first precision of a process for good."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


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
