"""The embedded teacher's structure with random weights, for tests of everything around it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState

from train_lora import model_setup
from train_lora.config import Config
from train_lora.models.components import Components
from train_lora.models.text import Condition, size_ids

from .picture_files import captioned_folder
from .prepared import PICTURES
from .tiny import demo_config, random_components


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """As torchrun gives its processes: sums over several threads have another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def tiny_model(monkeypatch: pytest.MonkeyPatch, shared_components: Components) -> None:
    """The embedded teacher's place is taken by the same networks with random weights."""
    PartialState(cpu=True)
    monkeypatch.setattr(model_setup, "load_model", lambda config, device: shared_components)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of captioned pictures of two shapes."""
    return captioned_folder(tmp_path / "photos", PICTURES)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """A file of seven prompts."""
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"a scene number {number}" for number in range(7)))
    return path


@pytest.fixture
def data_config(tmp_path: Path, photos: Path, prompts: Path) -> Callable[..., Config]:
    """Makes a config for these data with a cache; `section__key=value` overrides, None for none."""

    def make(**overrides: Any) -> Config:
        paths = {"data__prompts": prompts, "data__real_images": photos}
        options = {"data__cache": tmp_path / "cache", "training__batch_size": 3}
        given = paths | options | overrides
        return demo_config(tmp_path / "run", **{k: v for k, v in given.items() if v is not None})

    return make


@pytest.fixture
def tiny_teacher(monkeypatch, shared_components: Components, components: Components) -> None:
    """The embedded teacher's place is taken by random weights; each load is a fresh UNet."""

    def load() -> Components:
        names = components.__dataclass_fields__
        fields = {name: getattr(components, name) for name in names}
        return Components(**(fields | {"unet": copy.deepcopy(shared_components.unet)}))

    monkeypatch.setattr("train_lora.demo.teacher.load_teacher", load)
