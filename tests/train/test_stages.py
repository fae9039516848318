"""Training in two stages with other settings: SD1.5 in 1 and in 4 steps, first without GAN."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dmd2_core import StepPlan
from tests.train import hasty, stages_worker
from tests.train.launching import finish
from tests.train.tiny_sd15 import drawing_sd15, random_sd15
from train_lora.cli import main
from train_lora.export import read_lora, shared_unet_with_lora
from train_lora.models.components import Components
from train_lora.models.roles import STUDENT, TEACHER, LoraSpec, SharedUNet
from train_lora.models.saving import save_single_file
from train_lora.models.text import encode_prompts
from train_lora.sampling import sample_latents

CAPTIONS = ("a red ring", "a green star")
SMALL = {
    "data.resolution_px": 128,
    "student.rank": 4,
    "student.alpha": 4,
    "critic.rank": 4,
    "critic.alpha": 4,
    "critic.updates_per_generator": 2,
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.mixed_precision": "no",
    "training.gradient_checkpointing": "false",
    "logging.trackers": "[]",
}
FIRST = {"student.learning_rate": 3e-3, "critic.learning_rate": 3e-3}
SECOND = {"student.learning_rate": 5e-4, "critic.learning_rate": 5e-4}
SECOND |= {"data.real_images": "teacher", "data.teacher_images": 4}
FOUR_STEPS = {"sampling.steps": 4, "sampling.conditioning_timestep": "none"}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_single_file(drawing_sd15(), folder / "model.safetensors", dtype=torch.float32)
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    return folder


def command(stage: int, inputs: Path, run: Path, **changes: Any) -> list[str]:
    """`changes`: section__key=value; None takes a value back."""
    values: dict[str, Any] = {
        "model.path": inputs / "model.safetensors",
        "data.prompts": inputs / "prompts.txt",
        "output.directory": run,
        "validation.every": 0,
    }
    values |= SMALL | (FIRST if stage == 1 else SECOND)
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    words = [f"--{key}={value}" for key, value in values.items() if value is not None]
    return ["train", "--preset", f"sd15-1step-stage{stage}", *words]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Both runs, and what the second one started from."""

    first: Path
    second: Path
    begun: Path


def both(folder: Path, inputs: Path, iterations: tuple[int, int], **changes: Any) -> Stages:
    stages = Stages(first=folder / "one", second=folder / "two", begun=folder / "begun")
    first, second = iterations
    argv = command(1, inputs, stages.first, training__iterations=first, **changes)
    assert hasty.main(argv) == 0
    changes = {"training__continue_from": stages.first, "training__iterations": second} | {
        key: value for key, value in changes.items() if not key.startswith("validation")
    }
    assert stages_worker.main(command(2, inputs, stages.second, **changes), stages.begun) == 0
    return stages


@pytest.fixture(scope="module")
def one_step(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """Its first stage keeps a best checkpoint, which is not its last."""
    watched = {"validation__every": 16, "validation__panels": "false"}
    return both(tmp_path_factory.mktemp("one_step"), inputs, (24, 8), **watched)


@pytest.fixture(scope="module")
def four_steps(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    settings = {key.replace(".", "__"): value for key, value in FOUR_STEPS.items()}
    return both(tmp_path_factory.mktemp("four_steps"), inputs, (12, 4), **settings)


def drawn(unet: SharedUNet, role: str, model: Components, plan: StepPlan, **how: Any):
    condition = encode_prompts(model, list(CAPTIONS) * 4, 128, 128)
    latents = sample_latents(unet, role, model, condition, plan, seed=1, **how)
    return torch.cat([latents.mean((0, 2, 3)), latents.std((0, 2, 3))])


def distances(stages: Stages, plan: StepPlan) -> list[float]:
    """Of means and deviations from the guided teacher's: untrained, after stage 1, after stage 2."""
    model = drawing_sd15()
    unet = SharedUNet(model.unet, {STUDENT: LoraSpec(rank=1, alpha=1.0)}, seed=0)
    teacher = drawn(unet, TEACHER, model, StepPlan.evenly(20), guidance=1.75, strength=0.0)
    found = [drawn(unet, STUDENT, model, plan)]
    for run in (stages.first, stages.second):
        unet, recipe = shared_unet_with_lora(random_like(model), run / "lora.safetensors")
        assert recipe is not None
        assert recipe.plan() == plan
        found.append(drawn(unet, STUDENT, model, plan))
    return [float((student - teacher).norm()) for student in found]


def random_like(model: Components):
    """A UNet without adapters, of the same weights."""
    other = random_sd15().unet
    other.conv_out.load_state_dict(
        {n.removeprefix("base_layer."): t for n, t in model.unet.conv_out.state_dict().items()}
    )
    return other


def test_experiment(one_step, four_steps):
    print("1", distances(one_step, StepPlan.evenly(1, conditioning_timestep=399)))
    print("4", distances(four_steps, StepPlan.evenly(4)))
