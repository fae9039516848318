"""Training in two stages with other settings: SD1.5 in 1 and in 4 steps, first without GAN."""

from __future__ import annotations

import copy
import json
import logging
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dmd2_core import StepPlan
from tests.train import hasty, stages_worker
from tests.train.launching import finish
from tests.train.tiny import small_trainer, weights
from tests.train.tiny_sd15 import SHALLOW, drawing_sd15, random_sd15
from train_lora.checkpoint import tensors_of
from train_lora.cli import main
from train_lora.export import load_lora_into, read_lora
from train_lora.loop import Trainer
from train_lora.models.components import Components
from train_lora.models.roles import STUDENT, TEACHER, LoraSpec, SharedUNet
from train_lora.models.saving import save_diffusers_folder
from train_lora.models.text import encode_prompts
from train_lora.sampling import sample_latents
from train_lora.stages import continue_from

CAPTIONS = ("a red ring", "a green star")
SMALL = {
    "data.resolution_px": 128,
    "student.rank": 4,
    "student.alpha": 4,
    "student.learning_rate": 1e-3,
    "critic.rank": 4,
    "critic.alpha": 4,
    "critic.learning_rate": 2e-3,
    "critic.updates_per_generator": 2,
    "training.batch_size": 4,
    "training.gradient_accumulation_steps": 1,
    "training.mixed_precision": "no",
    "training.gradient_checkpointing": "false",
    "training.ema_decay": 0.9,
    "validation.every": 0,
    "logging.trackers": "[]",
    "export.thumbnail": "false",
}
SECOND = {
    "student.learning_rate": 5e-5,  # a twentieth, as in the paper
    "critic.learning_rate": 1e-4,
    "data.real_images": "teacher",
    "data.teacher_images": 4,
}
FOUR_STEPS = {"sampling.steps": 4, "sampling.conditioning_timestep": "none"}
NETWORKS = ("student", "student_average", "critic")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def drawing() -> Components:
    return drawing_sd15()


@pytest.fixture(scope="module")
def inputs(drawing: Components, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    save_diffusers_folder(drawing, folder / "model")
    save_diffusers_folder(random_sd15(**SHALLOW), folder / "other")
    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    return folder


def command(stage: int, inputs: Path, run: Path, changes: dict[str, Any]) -> list[str]:
    """A value of None takes one back."""
    values: dict[str, Any] = {
        "model.path": inputs / "model",
        "data.prompts": inputs / "prompts.txt",
        "output.directory": run,
    }
    values |= SMALL | (SECOND if stage == 2 else {}) | changes
    words = [f"--{key}={value}" for key, value in values.items() if value is not None]
    return ["train", "--preset", f"sd15-1step-stage{stage}", *words]


@dataclass(frozen=True, kw_only=True, slots=True)
class Stages:
    """Both runs, and what the second one started from."""

    first: Path
    second: Path
    begun: Path


def both(
    folder: Path, inputs: Path, iterations: tuple[int, int], *, watched: int = 0, **more: Any
) -> Stages:
    """`watched`: `validation.every` of the first; the second gets its folder."""
    stages = Stages(first=folder / "one", second=folder / "two", begun=folder / "begun")
    shared, (first, second) = more.get("settings", {}), iterations
    own = {"training.iterations": first}
    if watched:
        own |= {"validation.every": watched, "validation.panels": "false"}
    assert hasty.main(command(1, inputs, stages.first, shared | own)) == 0
    own = {"training.iterations": second, "training.continue_from": stages.first}
    assert stages_worker.main(command(2, inputs, stages.second, shared | own), stages.begun) == 0
    return stages


@pytest.fixture(scope="module")
def one_step(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    """The best checkpoint of its first stage is not the last."""
    return both(tmp_path_factory.mktemp("one_step"), inputs, (14, 4), watched=12)


@pytest.fixture(scope="module")
def four_steps(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    return both(tmp_path_factory.mktemp("four_steps"), inputs, (14, 4), settings=FOUR_STEPS)


def assert_begun(begun: Path, checkpoint: Path, processes: int = 1) -> None:
    """With the checkpoint's networks to the last bit, a new head, and nothing else of it."""
    for name in NETWORKS:
        was = load_file(checkpoint / f"{name}.safetensors")
        now = load_file(begun / f"{name}.safetensors")
        heads = {tensor for tensor in now if tensor.startswith("head.")}
        assert set(now) - heads == set(was)
        assert bool(heads) == (name == "critic")
        assert all(torch.equal(was[tensor], now[tensor]) for tensor in was), name
    for name in ("student_optimizer", "critic_optimizer"):
        assert load_file(checkpoint / f"{name}.safetensors")
        assert not load_file(begun / f"{name}.safetensors")
    for rank in range(processes):
        assert float((begun / f"counters_{rank}.txt").read_text()) == 0


def test_the_second_stage_starts_from_the_best_of_the_first(one_step: Stages) -> None:
    assert json.loads((one_step.first / "best.json").read_text())["iteration"] == 12
    assert_begun(one_step.begun, one_step.first / "checkpoints" / "000012")


def test_or_from_the_newest_where_none_is_the_best(four_steps: Stages) -> None:
    assert not (four_steps.first / "best.json").exists()
    assert_begun(four_steps.begun, four_steps.first / "checkpoints" / "000014")
    student, average = (
        load_file(four_steps.begun / f"{name}.safetensors") for name in NETWORKS[:2]
    )
    assert any(not torch.equal(student[name], average[name]) for name in student)


def looks(unet: SharedUNet, role: str, model: Components, plan: StepPlan, **how: Any) -> Tensor:
    """Mean and deviation of each channel."""
    condition = encode_prompts(model, list(CAPTIONS) * 2, 128, 128)
    latents = sample_latents(unet, role, model, condition, plan, seed=1, **how)
    return torch.cat([latents.mean((0, 2, 3)), latents.std((0, 2, 3))])


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("one_step", StepPlan.evenly(1, conditioning_timestep=399)),
        ("four_steps", StepPlan.evenly(4)),
    ],
)
def test_samples_come_closer_to_the_teachers(
    drawing: Components, name: str, plan: StepPlan, request: pytest.FixtureRequest
) -> None:
    """The distance of `looks` from the guided teacher's: untrained, and after each stage."""
    stages: Stages = request.getfixturevalue(name)
    model = replace(drawing, unet=copy.deepcopy(drawing.unet))
    unet = SharedUNet(model.unet, {STUDENT: LoraSpec(rank=4, alpha=4.0)}, seed=0)
    teacher = looks(unet, TEACHER, model, StepPlan.evenly(20), guidance=1.75, strength=0.0)
    distances = [float((looks(unet, STUDENT, model, plan) - teacher).norm())]
    for run in (stages.first, stages.second):
        _, recipe = read_lora(run / "lora.safetensors")
        assert recipe is not None
        assert recipe.plan() == plan
        load_lora_into(unet, run / "lora.safetensors")
        distances.append(float((looks(unet, STUDENT, model, plan) - teacher).norm()))
    untrained, first, second = distances
    assert first < 0.6 * untrained, distances
    assert second < 0.6 * untrained, distances


def test_two_processes_start_from_the_same_full_weights(inputs: Path, tmp_path: Path) -> None:
    """Sharded, from the checkpoint of one process."""
    full = {"student.kind": "full", "student.alpha": None, "training.iterations": 1}
    assert hasty.main(command(1, inputs, tmp_path / "one", full)) == 0
    pair = full | {"training.batch_size": 2, "training.continue_from": tmp_path / "one"}
    argv = command(2, inputs, tmp_path / "two", pair)
    finish(stages_worker.main, argv, tmp_path / "begun", processes=2)
    assert_begun(tmp_path / "begun", tmp_path / "one" / "checkpoints" / "000001", processes=2)


def test_resuming_and_exporting_the_second_need_the_first_no_more(
    four_steps: Stages, tmp_path: Path
) -> None:
    first, run = four_steps.first.rename(tmp_path / "gone"), tmp_path / "run"
    shutil.copytree(four_steps.second, run)
    try:
        assert main(["export", str(run), "--out", str(tmp_path / "lora.safetensors")]) == 0
        assert main(["train", "--resume", str(run), "--iterations", "5"]) == 0
    finally:
        first.rename(four_steps.first)
    before, after = (
        read_lora(folder / "lora.safetensors")[1].trained_with
        for folder in (four_steps.second, run)
    )
    exported = (tmp_path / "lora.safetensors").read_bytes()
    assert exported == (four_steps.second / "lora.safetensors").read_bytes()
    assert (before["training"]["iterations"], after["training"]["iterations"]) == (4, 5)
    assert before["training"]["continue_from"] == "one"
    for told in (before, after):
        assert told["earlier"]["training"]["iterations"] == 14
        assert told["earlier"]["student"]["learning_rate"] == 1e-3
        assert told["earlier"]["gan"] == {"enabled": False}
        assert str(tmp_path.parent) not in json.dumps(told)


# -- on the embedded teacher's structure: what is taken and what begins anew -----------------------


def saved(trainer: Trainer) -> Path:
    """Its checkpoint, after an iteration."""
    trainer.iterate(0)
    trainer.iteration = 1
    trainer.save()
    return trainer.checkpoints.run / "checkpoints" / "000001"


def head_of(trainer: Trainer) -> list[Tensor]:
    critic = tensors_of(trainer)["critic"]
    return [tensor for name, tensor in critic.items() if name.startswith("head.")]


def test_the_same_gan_goes_on_and_the_average_keeps_its_pace(tmp_path: Path) -> None:
    old = small_trainer(tmp_path / "one")
    checkpoint = saved(old)
    new = small_trainer(tmp_path / "two", gan__generator_weight=0.1, training__seed=5)
    assert not all(map(torch.equal, head_of(new), head_of(old)))
    continue_from(new, checkpoint)
    assert head_of(new)
    assert all(map(torch.equal, head_of(new), head_of(old)))
    for role in ("student", "critic"):
        assert torch.equal(weights(new, role), weights(old, role))
    assert all(map(torch.equal, new.average.averages, old.average.averages))
    assert (new.average.num_updates, new.iteration) == (1, 0)
    assert not new.student.optimizer.state


def test_a_new_gan_has_a_new_head_and_none_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    without = small_trainer(tmp_path / "one", gan__enabled="false")
    checkpoint = saved(without)
    caplog.set_level(logging.INFO)
    new = small_trainer(tmp_path / "two")
    head = [tensor.clone() for tensor in head_of(new)]
    continue_from(new, checkpoint)
    assert all(map(torch.equal, head_of(new), head))
    assert "the discriminator's head starts anew" in caplog.text
    assert torch.equal(weights(new, "critic"), weights(without, "critic"))
    with_gan = small_trainer(tmp_path / "three")
    continue_from(without, saved(with_gan))
    assert torch.equal(weights(without, "critic"), weights(with_gan, "critic"))


def test_what_an_earlier_run_started_from_is_told_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its licence reaches every later stage."""
    first = small_trainer(tmp_path / "one")
    student = replace(first.config.student, init=str(tmp_path / "few.safetensors"))
    first.config = replace(first.config, student=student)
    checkpoint = saved(first)
    caplog.set_level(logging.INFO)
    second = small_trainer(tmp_path / "two")
    continue_from(second, checkpoint)
    assert "warm start of the student from few.safetensors" in caplog.text
    caplog.clear()
    third = small_trainer(tmp_path / "three")
    continue_from(third, saved(second))
    assert "warm start of the student from few.safetensors" in caplog.text
    assert third.earlier["earlier"]["student"]["init"] == "few.safetensors"


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"training.continue_from": "{}/absent"}, "absent', which is no folder; name the folder"),
        ({"training.continue_from": "{}/empty"}, "empty cannot be used: it has no checkpoint"),
        (
            {"training.continue_from": "{}/one/checkpoints/000013"},
            "has no checkpoint of iteration 13; it has: 12, 14",
        ),
        ({"training.continue_from": "{}/one/checkpoints/000014"}, "is damaged: critic.safetensors"),
        ({"student.init": "few.safetensors"}, "student.init is 'few.safetensors', but training.co"),
        ({"student.rank": 8}, "student.rank is 8, but"),
        ({"critic.alpha": 8}, "was trained with 4.0; set it to that, or start without"),
        (
            {"critic.kind": "full", "critic.rank": None, "critic.alpha": None},
            "critic.kind is 'full",
        ),
        ({"model.prediction": "v"}, "model.prediction is 'v', but"),
        ({"model.path": "{}/inputs/other"}, "model.path is not the model that"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    one_step: Stages,
    inputs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    sentence: str,
) -> None:
    (tmp_path / "inputs").symlink_to(inputs)
    (tmp_path / "empty").mkdir()
    shutil.copytree(one_step.first, tmp_path / "one")
    broken = tmp_path / "one" / "checkpoints" / "000014" / "critic.safetensors"
    broken.write_bytes(broken.read_bytes()[:-1])
    values = {"training.continue_from": "{}/one"} | changes
    values = {k: str(v).format(tmp_path) if v is not None else v for k, v in values.items()}
    assert main(command(2, inputs, tmp_path / "two", values)) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("dmd2: error: ")
    assert sentence in last
    assert not (tmp_path / "two").exists()
