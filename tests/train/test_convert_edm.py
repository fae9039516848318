"""Pickles as EDM publishes them to safetensors, and every other pickle refused unrun."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from train_lora.cli import main
from train_lora.models.edm_network import EDMNetwork, load_edm
from train_lora.models.edm_unet import EDMConfig

SMALL = EDMConfig(
    resolution_px=8,
    classes=3,
    width=32,
    width_factors=(1, 2),
    blocks=1,
    attention_px=(4,),
    head_channels=64,
)
BOX = torch.full((1, 1, 2, 2), 0.25)
SOURCE = "raise RuntimeError('the source code in the file was run')"


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    raise AssertionError("the pickle was opened without restrictions")


class Published(nn.Module):
    """A module that pickles as EDM's do: its class by source code, its attributes as a dict."""

    def __reduce__(self) -> tuple[Any, ...]:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": "EDMPrecond",
            "state": dict(self.__dict__),
        }
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (meta,), None


class EasyDict(dict):  # type: ignore[type-arg]
    pass


def as_published(network: EDMNetwork) -> Published:
    """The same weights in a tree of modules of the published kind, with its constant filters."""
    root = Published()
    root._init_args, root._init_kwargs = (), EasyDict(img_resolution=8, sigma_data=0.25)
    state = dict(network.state_dict())
    for block in ("enc.4x4_down", "dec.8x8_up"):
        state |= {f"model.{block}.{part}.resample_filter": BOX for part in ("conv0", "skip")}
    for name, value in state.items():
        *path, last = name.split(".")
        module: nn.Module = root
        for part in path:
            if part not in module._modules:
                child = nn.ModuleDict() if part in ("enc", "dec") else Published()
                module.add_module(part, child)
            module = module._modules[part]  # type: ignore[assignment]
        if last == "resample_filter":
            module.register_buffer(last, value.clone())
        else:
            module.register_parameter(last, nn.Parameter(value.clone()))
    return root


@pytest.fixture
def publish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Any], Path]:
    """Write an object as a pickle whose names are those of EDM's own modules."""

    def write(content: Any) -> Path:
        with monkeypatch.context() as patch:
            for name, members in {
                "torch_utils": (),
                "torch_utils.persistence": (_reconstruct_persistent_obj,),
                "dnnlib": (),
                "dnnlib.util": (EasyDict,),
            }.items():
                module = types.ModuleType(name)
                patch.setitem(sys.modules, name, module)
                for member in members:
                    patch.setattr(member, "__module__", name)
                    setattr(module, member.__name__, member)
            data = pickle.dumps(content)
        path = tmp_path / "edm.pkl"
        path.write_bytes(data)
        return path

    return write


@pytest.fixture
def network() -> EDMNetwork:
    torch.manual_seed(0)
    network = EDMNetwork(SMALL)
    for weight in network.parameters():
        nn.init.normal_(weight)
    return network


def test_a_published_pickle_gives_the_same_network(network, publish, tmp_path, capsys) -> None:
    source = publish({"ema": as_published(network), "loss_fn": Published()})
    out = tmp_path / "edm.safetensors"
    assert b"torch_utils.persistence" in source.read_bytes()
    assert main(["convert-edm", str(source), str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 8 px, 3 classes\n"
    written = load_file(out)
    assert written.keys() == network.state_dict().keys()  # the constant filters are left out
    assert all(torch.equal(written[name], value) for name, value in network.state_dict().items())
    loaded = load_edm(out)
    assert loaded.config.sigma_data == 0.25  # as the pickle says
    assert (loaded.config.width_factors, loaded.config.attention_px) == ((1, 2), (4,))


class Command:
    """Runs a shell command when it is opened."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


class Bytes:
    """A tensor's storage whose bytes are another pickle."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __reduce__(self) -> tuple[Any, ...]:
        return torch.storage._load_from_bytes, (self.data,)


class Rebuilt:
    """A tensor of a storage, with a shape and strides of one's own."""

    def __init__(self, storage: Any, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
        self.arguments = storage, 0, shape, strides, False, None

    def __reduce__(self) -> tuple[Any, ...]:
        return torch._utils._rebuild_tensor_v2, self.arguments


def with_tensor(root: Published, tensor: Any) -> Published:
    root._parameters["made_up"] = tensor
    return root


def stored(content: Any) -> Bytes:
    data = io.BytesIO()
    torch.save(content, data, _use_new_zipfile_serialization=False)
    return Bytes(data.getvalue())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda r, c: {"ema": r, "more": c}, r"it holds (posix|nt)\.system, which"),
        (
            lambda r, c: {"ema": with_tensor(r, Rebuilt(stored(c), (1,), (1,)))},
            "where a tensor's bytes",
        ),
        (lambda r, c: {"ema": with_tensor(r, c)}, r"it holds (posix|nt)\.system"),
        (lambda r, c: {"ema": r, "f": print}, r"it holds builtins\.print"),
        (
            lambda r, c: {"ema": with_tensor(r, Rebuilt(stored(1), (1,), (1,)))},
            "where a tensor's bytes",
        ),
        (lambda r, c: {"ema": with_tensor(r, 3)}, "it holds a parameter that is no tensor"),
        (lambda r, c: {"G_ema": r}, 'it holds no network under the name "ema"'),
        (lambda r, c: [1, 2], 'it holds no network under the name "ema"'),
        (lambda r, c: {"ema": with_tensor(r, torch.ones(2))}, "tensor made_up belongs to another"),
    ],
)
def test_other_pickles_are_refused_and_nothing_in_them_is_run(
    network, publish, tmp_path, capsys, content, message
) -> None:
    marker, out = tmp_path / "was_run", tmp_path / "edm.safetensors"
    source = publish(content(as_published(network), Command(f"echo > {marker}")))
    refused(source, out, message, capsys)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("shape", "strides", "message"),
    [((8,), (1,), "larger than its bytes"), ((2,), (9,), "is no EDM checkpoint")],
)
def test_tensors_stay_within_their_bytes(
    network, publish, tmp_path, capsys, shape, strides, message
) -> None:
    storage = torch.arange(4.0).__reduce_ex__(4)[1][0]
    root = with_tensor(as_published(network), Rebuilt(storage, shape, strides))
    refused(publish({"ema": root}), tmp_path / "edm.safetensors", message, capsys)


def test_another_resampling_filter_is_refused(network, publish, tmp_path, capsys) -> None:
    root = as_published(network)
    root.model.enc["4x4_down"].conv0.resample_filter[0, 0, 0, 0] = 0.5
    message = r"4x4_down\.conv0\.resample_filter is not the mean of 2x2 pixels"
    refused(publish({"ema": root}), tmp_path / "edm.safetensors", message, capsys)


@pytest.mark.parametrize("data", [b"", b"not a pickle", b"\x80\x04"])
def test_what_is_no_pickle_is_refused(tmp_path, capsys, data) -> None:
    source = tmp_path / "edm.pkl"
    source.write_bytes(data)
    refused(source, tmp_path / "edm.safetensors", "is no EDM checkpoint, or is damaged", capsys)


def test_files_that_cannot_be_used_are_named(tmp_path, capsys) -> None:
    source, out = tmp_path / "edm.pkl", tmp_path / "edm.safetensors"
    refused(source, out, r"No such file or directory: .*edm\.pkl", capsys)
    refused(source, tmp_path / "edm.bin", "does not end in .safetensors", capsys)
    out.write_bytes(b"mine")
    assert main(["convert-edm", str(source), str(out)]) == 2
    assert "exists: name another file" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"


def refused(source: Path, out: Path, message: str, capsys: Any) -> None:
    """Exit code 2, one sentence, no file."""
    assert main(["convert-edm", str(source), str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1
    assert re.search(message, captured.err), captured.err
    assert not out.exists()
