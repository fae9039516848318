"""Models that cannot be used, as the user meets them: one sentence, exit code 2, no traces."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from train_lora.cli import main
from train_lora.models.saving import save_single_file

from .tiny import random_components, student_file
from .tiny_sd15 import random_sd15


def run(tmp_path: Path, *arguments: str) -> int:
    where = ["--output.directory", str(tmp_path / "run"), "--iterations", "1", "--batch-size", "1"]
    return main(["train", "--preset", "demo", *where, *arguments])


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    save_single_file(random_components(), path)
    return path


def truncated(good: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "m.safetensors").write_bytes(good.read_bytes()[:100_000])
    return ["--model.path", str(tmp_path / "m.safetensors")]


def pickle(good: Path, tmp_path: Path) -> list[str]:
    torch.save({"state_dict": {}}, tmp_path / "m.ckpt")
    return ["--model.path", str(tmp_path / "m.ckpt")]


def something_else(good: Path, tmp_path: Path) -> list[str]:
    save_file({"weight": torch.zeros(3)}, tmp_path / "m.safetensors")
    return ["--model.path", str(tmp_path / "m.safetensors")]


def another_shape(good: Path, tmp_path: Path) -> list[str]:
    name = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    tensors = {key: tensor.contiguous() for key, tensor in load_file(good).items()}
    save_file(tensors | {name: tensors[name][:-1].contiguous()}, tmp_path / "m.safetensors")
    return ["--model.path", str(tmp_path / "m.safetensors")]


def a_folder(good: Path, tmp_path: Path) -> list[str]:
    (tmp_path / "folder").mkdir()
    return ["--model.path", str(tmp_path / "folder")]


def a_hub_id(good: Path, tmp_path: Path) -> list[str]:
    return ["--model.path", "org/unknown-to-the-cache"]


def contradiction(good: Path, tmp_path: Path) -> list[str]:
    model = replace(random_components(), prediction="v")
    save_single_file(model, tmp_path / "m.safetensors")
    return ["--model.path", str(tmp_path / "m.safetensors"), "--model.prediction", "epsilon"]


def edm(good: Path, tmp_path: Path) -> list[str]:
    tensors = load_file(good) | {"edm_mean": torch.zeros(1)}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, tmp_path / "m.safetensors")
    return ["--model.path", str(tmp_path / "m.safetensors")]


def foreign_lora(good: Path, tmp_path: Path) -> list[str]:
    path = student_file(tmp_path / "sd15.safetensors", components=random_sd15())
    return ["--model.path", str(good), "--student.init", str(path), "--student.rank", "2"]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (truncated, "is damaged, incomplete or not a safetensors file"),
        (pickle, "is a pickle"),
        (something_else, "is neither an SDXL nor an SD1.5 checkpoint"),
        (another_shape, "structure (size mismatch for down_blocks.0.resnets.0.conv1.weight"),
        (a_folder, "is a folder without model_index.json"),
        (a_hub_id, "is not an existing path and cannot be had from huggingface.co"),
        (contradiction, 'model.prediction is "epsilon", but'),
        (edm, "was trained on an EDM schedule"),
        (foreign_lora, "is for another architecture"),
    ],
)
def test_one_sentence_exit_2_and_nothing_written(
    good: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    make: Callable[[Path, Path], list[str]],
    sentence: str,
) -> None:
    assert run(tmp_path, *make(good, tmp_path)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert sentence in lines[-1]
    assert lines[-1].startswith("dmd2: error: ")
    assert not any("Traceback" in line for line in lines)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--student.kind", "full", "--student.init", "x.safetensors"], "only a LoRA starts from"),
        (["--student.kind", "full", "--student.alpha", "4"], "student.alpha is 4.0 but has no eff"),
        (["--critic.kind", "full", "--critic.rank", "4"], "critic.rank is 4 but has no effect"),
        (["--model.prediction", "v"], "model.prediction is 'v' but has no effect"),
        (["--base-precision", "bf16"], 'training.mixed_precision to "bf16"'),
        (["--base-precision", "int8"], "model.base_precision is 'int8'"),
    ],
)
def test_contradictions_of_the_config(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert run(tmp_path, *arguments) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
