"""One-step SDXL's preset in one process and in two: pairs, gradients; gone on with anywhere.

The embedded teacher takes SDXL's place, with LPIPS of its decoded pictures.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.train import hasty
from tests.train.launching import finish
from train_lora.models.safetensors_io import read_safetensors

from .metric_files import alexnet_file

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="gloo, as in test_processes.py")

ITERATIONS = 4


def arguments(folder: Path, pairs: Path, run: Path) -> list[str]:
    """Two of regression, one of the critic alone, one of DMD that keeps the regression."""
    settings = {
        "model.path": "demo",
        "output.directory": run,
        "data.prompts": folder / "prompts.txt",
        "data.resolution_px": 128,
        "distribution_matching.guidance": 2.0,
        "gan.enabled": "false",
        "student.rank": 2,
        "critic.rank": 2,
        "critic.warmup_iterations": 1,
        "regression.pairs": pairs,
        "regression.num_pairs": 4,  # two files, one for each process
        "regression.teacher_steps": 1,
        "regression.warmup_iterations": 2,
        # So that later steps see nearly the same weights: Adam's first steps are nearly signs,
        # which the last bits decide where a gradient is about 0.
        "regression.learning_rate": 1e-7,
        "regression.loss": "lpips",
        "regression.lpips_weights": folder / "alexnet.pth",
        "training.objective": "dmd",
        "training.iterations": ITERATIONS,
        "training.gradient_accumulation_steps": 1,
        "training.mixed_precision": "no",
        "validation.every": 0,
        "checkpoint.every": 1,
        "checkpoint.keep_last": ITERATIONS,
        "logging.trackers": "[]",
        "export.thumbnail": "false",
    }
    return ["--preset", "sdxl-1step", *(f"--{key}={value}" for key, value in settings.items())]


@dataclass(frozen=True, kw_only=True, slots=True)
class Made:
    """By so many processes."""

    pairs: Path
    run: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Made]:
    """By one process, and by two with half the batch in each."""
    folder, found = tmp_path_factory.mktemp("stages"), []
    alexnet_file(folder)
    captions = (f"a {colour} ring on a plain background\n" for colour in ("red", "green", "blue"))
    (folder / "prompts.txt").write_text("".join(captions))
    for number in (1, 2):
        pairs, run = folder / f"pairs{number}", folder / f"run{number}"
        argv = arguments(folder, pairs, run)
        printed = finish(hasty.main, ["pairs", *argv], processes=number)
        # Twice would mean two processes that each think they are alone.
        assert printed.count("report.json") == 1
        batch = f"--training.batch_size={4 // number}"
        finish(hasty.main, ["train", *argv, batch], processes=number)
        found.append(Made(pairs=pairs, run=run))
    return found


def test_two_processes_make_the_pairs_of_one(made: list[Made]) -> None:
    one, two = (side.pairs for side in made)
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in two.iterdir())
    shards = [name for name in names if name.endswith(".safetensors")]
    assert shards == ["pairs-000000.safetensors", "pairs-000001.safetensors"]
    for name in set(names) - set(shards):
        assert json.loads((one / name).read_text()) == json.loads((two / name).read_text())
    for name in shards:
        (tensors, facts), (others, other_facts) = (
            read_safetensors(side / name) for side in (one, two)
        )
        assert facts == other_facts
        assert tensors.keys() == others.keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, others[key]), key


@pytest.mark.parametrize("iteration", [1, ITERATIONS])
def test_two_processes_give_the_student_the_gradient_of_one(
    made: list[Made], iteration: int
) -> None:
    """Of the regression, and of DMD's first update, whose moments start anew: after one update
    Adam's mean is a tenth of the gradient."""
    means = []
    for side in made:
        checkpoint = side.run / "checkpoints" / f"{iteration:06d}"
        state = json.loads((checkpoint / "state.json").read_text())
        assert state["matches"]["global batch"] == 4
        tensors = load_file(checkpoint / "student_optimizer.safetensors")
        assert {t.item() for n, t in tensors.items() if n.endswith(".step")} == {1.0}
        parts = (t.flatten() for n, t in sorted(tensors.items()) if n.endswith(".exp_avg"))
        means.append(torch.cat(list(parts)))
    one, two = means
    assert one.norm() > 0
    # LPIPS has kinks (ReLU, pooling): changing latents by 1e-7 was seen to change the gradient of
    # this network by 2e-3. A part of the batch lost or counted twice changes it by far more.
    assert (one - two).norm() < 1e-2 * one.norm()


@pytest.mark.parametrize("iteration", [1, 2, 3])
def test_the_preset_goes_on_from_each_stage_to_the_same_file(
    made: list[Made], tmp_path: Path, iteration: int
) -> None:
    """Within the regression, at its end, and with the critic begun; by the command."""
    run = tmp_path / "run"
    shutil.copytree(made[0].run, run)
    assert hasty.main(["train", "--resume", str(run / "checkpoints" / f"{iteration:06d}")]) == 0
    again = (run / "lora.safetensors").read_bytes()
    assert again == (made[0].run / "lora.safetensors").read_bytes()
