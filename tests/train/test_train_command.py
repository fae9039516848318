"""`dmd2 train` as a user runs it, on the embedded teacher, a few iterations long."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from tests.train import hasty
from tests.train.launching import finish
from train_lora.cli import main
from train_lora.config_load import load
from train_lora.export import read_lora

SHORT = ["--iterations", "6", "--batch_size", "2", "--student.rank", "4", "--critic.rank", "4"]


def short(directory: Path, *more: str) -> list[str]:
    return ["train", "--preset", "demo", "--output.directory", str(directory), *SHORT, *more]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "prompts.txt"
    path.write_text(
        "a red ring on a plain blue background\na green star on a striped gray background\n"
    )
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.new("RGB", (160, 140), (80 * number, 40, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a plain purple background")
    return folder


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, prompts: Path, photos: Path
) -> tuple[Path, Path]:
    """Two runs that learn the same, the second from the first one's config.toml, unwatched."""
    folder = tmp_path_factory.mktemp("runs")
    own_data = ["--data.prompts", str(prompts), "--data.real_images", str(photos)]
    watched = ["--validation.every", "6", "--validation.num_prompts", "2"]
    finish(hasty.main, short(folder / "first", *own_data, *watched))
    config = ["--config", str(folder / "first" / "config.toml"), "--validation.every", "0"]
    command = [sys.executable, "-m", "train_lora.cli", "train", *config]
    done = subprocess.run(
        [*command, "--output.directory", str(folder / "second")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},  # as the first
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{folder / 'second' / 'lora.safetensors'}\n"
    return folder / "first", folder / "second"


def test_the_same_seed_gives_the_same_file_byte_for_byte(runs: tuple[Path, Path]) -> None:
    first, second = ((run / "lora.safetensors").read_bytes() for run in runs)
    assert first == second


def test_a_run_leaves_config_logs_and_a_validation_grid(runs: tuple[Path, Path]) -> None:
    assert load(file=runs[0] / "config.toml").config.training.iterations == 6
    assert list((runs[0] / "logs").glob("events.*"))
    with Image.open(runs[0] / "samples" / "000006.png") as grid:
        assert grid.width > 2 * 128
        assert grid.height > 2 * 128


def test_the_lora_says_how_it_wants_to_be_sampled(runs: tuple[Path, Path]) -> None:
    modules, recipe = read_lora(runs[0] / "lora.safetensors")
    assert recipe is not None
    assert recipe.timesteps == (999, 749, 499, 249)
    assert recipe.trained_with["training"]["iterations"] == 6
    assert any(module.up.abs().max() > 0 for module in modules.values())
    with safe_open(runs[0] / "lora.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {  # noqa: SIM118
            torch.float16,
            torch.float32,  # the alphas
        }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--data.prompts", "absent.txt"], "absent.txt"),
        (["--data.real_images", "absent"], "absent"),
        (["--model.path", "absent.safetensors"], "absent.safetensors"),
        (["--sampling.timesteps", "[999, 999]"], "descend"),
        (["--sampling.timesteps", "[1000, 499]"], "1000"),
        (["--student.alpha", "0"], "student.alpha is 0"),
        (["--student.rnak", "4"], "rnak"),
        (["--data.resolution_px", "192"], "data.resolution_px is 192"),
        (["--data.resolution_px", "256"], "set it to 128"),
        (["--critic.warmup_iterations", "6"], "critic.warmup_iterations is 6"),
    ],
)
def test_what_the_user_got_wrong_is_one_sentence_and_nothing_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], sentence: str
) -> None:
    assert main(short(tmp_path / "run", *arguments)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("dmd2: error: ")
    assert sentence in lines[-1]
    assert not (tmp_path / "run").exists()


def test_an_empty_prompt_file_and_a_used_folder_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    assert main(short(tmp_path / "run", "--data.prompts", str(tmp_path / "empty.txt"))) == 2
    assert "empty.txt" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    assert main(short(tmp_path / "run")) == 2
    assert "not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]
