"""A training that stops and goes on: the same bits as one that never stopped; what it refuses."""

from __future__ import annotations

import copy
import json
import os
import random
import signal
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from train_lora.checkpoint import check_config, read_state, restore, tensors_of
from train_lora.checkpoint_store import newest_complete
from train_lora.data.encode import Part
from train_lora.data.store import MemoryTable
from train_lora.loop import Trainer
from train_lora.model_setup import build_trainable_unet
from train_lora.stop import IMPATIENCE_SECONDS, StopRequest, TrainingStopped
from train_lora.trainer import build_trainer

from .tiny import SMALL, demo_config, random_components, real_latents, small_trainer, weights

with_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
RHYTHM = {
    "training__batch_size": 1,
    "critic__updates_per_generator": 2,
    "training__gradient_accumulation_steps": 2,
    "training__iterations": 6,
    "checkpoint__every": 4,
    "logging__trackers": "[]",
}


def trainer_in(directory: Path, **overrides: object) -> Trainer:
    return small_trainer(directory, **(RHYTHM | overrides))


def all_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        f"{file}/{name}": tensor.detach().clone()
        for file, part in tensors_of(trainer).items()
        for name, tensor in part.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Trainer:
    """Six iterations at once, with checkpoints of 4 and of the end."""
    trainer = trainer_in(tmp_path_factory.mktemp("straight") / "run")
    trainer.run()
    return trainer


@pytest.fixture
def checkpoint(finished: Trainer) -> Path:
    return finished.checkpoints.run / "checkpoints" / "000004"


def test_going_on_from_a_checkpoint_gives_the_same_bits(
    finished: Trainer, checkpoint: Path, tmp_path: Path
) -> None:
    resumed = trainer_in(tmp_path / "run")
    restore(resumed, checkpoint, read_state(checkpoint))
    assert resumed.iteration == 4
    resumed.run()
    straight, again = all_tensors(finished), all_tensors(resumed)
    assert set(straight) == set(again)
    for name, tensor in straight.items():
        assert torch.equal(tensor, again[name]), name
    assert any(name.startswith("critic/head.") for name in straight)
    assert any(name.endswith("lora_A.weight.exp_avg_sq") for name in straight)
    finished.export(tmp_path / "a.safetensors")
    resumed.export(tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize(
    "overrides",
    [
        {"critic__kind": "full", "critic__rank": None},
        {"student__kind": "full"},
        pytest.param(
            {"training__optimizer": "adamw8bit", "critic__rank": 64}, marks=with_bitsandbytes
        ),
    ],
)
def test_full_weights_and_eight_bit_states_go_on_to_the_same_bits(
    tmp_path: Path, overrides: dict[str, object]
) -> None:
    straight = trainer_in(tmp_path / "straight", **overrides)
    for _ in range(3):
        straight.iterate(straight.iteration)
        straight.iteration += 1
        if straight.iteration == 2:
            straight.save()
    resumed = trainer_in(tmp_path / "resumed", **overrides)
    saved = newest_complete(tmp_path / "straight")
    restore(resumed, saved, read_state(saved))
    resumed.iterate(2)
    expected, found = all_tensors(straight), all_tensors(resumed)
    assert set(expected) == set(found)
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor, found[name]), name
    if "training__optimizer" in overrides:
        assert torch.uint8 in {tensor.dtype for tensor in expected.values()}
    else:
        assert any(name.endswith("/conv_in.weight") for name in expected)


def test_a_resumed_run_needs_no_lora_to_start_from(tmp_path: Path) -> None:
    """What it holds is in the checkpoint; the file itself may be gone."""
    trainer = trainer_in(tmp_path / "run")
    student = replace(trainer.config.student, init="gone.safetensors")
    config = replace(trainer.config, student=student)
    components = random_components()
    unet = build_trainable_unet(config, components, torch.device("cpu"), warm=False)
    again = build_trainer(config, components, trainer.data, Accelerator(cpu=True), unet)
    assert torch.equal(weights(again, "student"), weights(trainer, "student"))


def test_the_frozen_base_is_in_no_checkpoint_and_nothing_needs_unpickling(
    finished: Trainer, checkpoint: Path
) -> None:
    names = {path.name for path in checkpoint.iterdir()}
    parts = ("student", "critic", "student_average", "student_optimizer", "critic_optimizer")
    assert names == {*(f"{p}.safetensors" for p in parts), "state.json", "manifest.json"}
    unet = finished.distiller.unet
    assert set(load_file(checkpoint / "student.safetensors")) == set(
        unet.role_state_dict("student")
    )
    state = json.loads((checkpoint / "state.json").read_text())
    assert {"torch", "python", "peft"} <= set(state["versions"])
    assert state["matches"]["base model's hash"] == finished.distiller.components.base_hash
    assert state["config"] == finished.config.to_dict()


def test_an_iteration_draws_from_no_global_generator(tmp_path: Path) -> None:
    """Why a checkpoint holds no random state: there is none that matters."""
    trainer = trainer_in(tmp_path / "run")
    before = torch.get_rng_state(), random.getstate(), str(numpy.random.get_state())
    trainer.iterate(0)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), str(numpy.random.get_state()))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("base", r"its base model's hash is .*, now other; set --model.path"),
        ("prompts", r"its number of prompts is 6, now 5; put the prompts back"),
        ("batch", r"its global batch is 2, now 1; set training.batch_size"),
        ("rank", r"student.safetensors does not fit: \d+ tensors differ"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    checkpoint: Path, tmp_path: Path, what: str, message: str
) -> None:
    overrides = {
        "batch": {"training__gradient_accumulation_steps": 1},
        "rank": {"student__rank": 8},
    }
    trainer = trainer_in(tmp_path / "run", **overrides.get(what, {}))
    if what == "base":
        other = copy.copy(trainer.distiller.components)
        object.__setattr__(other, "base_hash", "other")
        object.__setattr__(trainer.distiller, "components", other)
    if what == "prompts":
        fewer = Part(columns={}, captions=list(trainer.data.captions)[:5])
        trainer.data = replace(trainer.data, prompts=MemoryTable(part=fewer))
    with pytest.raises(ValueError, match=message):
        restore(trainer, checkpoint, read_state(checkpoint))


def test_other_versions_are_told(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = read_state(checkpoint)
    state["versions"]["torch"] = "1.0"
    restore(trainer_in(tmp_path / "run"), checkpoint, state)
    assert "torch 1.0 -> " in caplog.text


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("student.rank", "8", r"student.rank is 8, .* trained with 4; leave it so"),
        ("training.seed", "5", r"training.seed is 5"),
        ("gan.enabled", "false", r"gan.enabled is false"),
        ("sampling.steps", "2", r"sampling.steps is 2"),
        ("critic.warmup_iterations", "1", r"critic.warmup_iterations is 1"),
        ("training.iterations", "3", r"training.iterations is 3, .* has done 4 already"),
        ("training.iterations", "9", None),
        ("student.learning_rate", "1e-6", None),
        ("checkpoint.keep_last", "5", None),
        ("validation.every", "7", None),
        ("training.gradient_checkpointing", "true", None),
        ("export.names", "diffusers", None),
        ("data.prompts", "elsewhere.txt", None),
        ("data.cache", "cache", r"data.cache is 'cache', .* trained with none"),
    ],
)
def test_what_may_change_in_the_middle_of_a_run(
    finished: Trainer, checkpoint: Path, key: str, value: str, message: str | None
) -> None:
    changes = SMALL | RHYTHM | {key.replace(".", "__"): value}
    config, file = demo_config(Path("run"), **changes), "run"
    state = read_state(checkpoint)
    if message is None:
        check_config(state, config, file)
    else:
        with pytest.raises(ValueError, match=message):
            check_config(state, config, file)


# -- stopping --------------------------------------------------------------------------------------


def signalled_in_iteration(trainer: Trainer, iteration: int, number: signal.Signals) -> None:
    """The process gets the signal while that iteration computes, as from Ctrl-C or `kill`."""
    step = trainer.critic.optimizer

    def send(*_: object) -> None:
        if trainer.iteration == iteration:
            os.kill(os.getpid(), number)

    step.register_step_pre_hook(send)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_iteration_saves_and_leaves(
    finished: Trainer, tmp_path: Path, number: signal.Signals
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    stopped = trainer_in(tmp_path / "run")
    signalled_in_iteration(stopped, 2, number)
    with pytest.raises(
        TrainingStopped, match=rf"{number.name} after iteration 3 and saved"
    ) as stop:
        stopped.run()
    assert stop.value.signal_number == number
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers

    saved = newest_complete(tmp_path / "run")
    assert saved.name == "000003"
    resumed = trainer_in(tmp_path / "run")
    restore(resumed, saved, read_state(saved))
    resumed.run()
    assert torch.equal(weights(resumed, "student"), weights(finished, "student"))
    assert torch.equal(weights(resumed, "critic"), weights(finished, "critic"))


def test_the_first_ctrl_c_asks_and_a_later_one_interrupts() -> None:
    with StopRequest(announce=False) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # what a launcher passes on is the same Ctrl-C
        assert stop.signal_number == signal.SIGINT
        stop._since = time.monotonic() - IMPATIENCE_SECONDS - 0.1
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# -- updates that are not finite -------------------------------------------------------------------


def test_an_update_that_is_not_finite_is_skipped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_in(tmp_path / "run", training__max_nonfinite_in_a_row=3)
    trainer.iterate(0)
    before = all_tensors(trainer)
    latents = real_latents(trainer)
    kept = latents.clone()
    latents.fill_(float("inf"))  # only the discriminator sees real images
    trainer.iterate(1)
    for name, tensor in all_tensors(trainer).items():
        assert torch.equal(tensor, before[name]), name
    assert trainer.standing_figures()["skipped_updates/critic"] == 1
    assert "skipped the critic's update of iteration 1: loss/gan_critic is nan" in caplog.text
    latents.copy_(kept)
    trainer.iterate(2)
    assert (trainer.critic.num_skipped, trainer.critic.skipped_in_a_row) == (1, 0)
    assert not torch.equal(weights(trainer, "critic"), before_of(before, "critic"))


def before_of(tensors: dict[str, torch.Tensor], role: str) -> torch.Tensor:
    own = [t.flatten() for n, t in tensors.items() if n.startswith(f"{role}/") and "head." not in n]
    return torch.cat(own)


def test_a_skipped_student_update_leaves_the_average_alone(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run")
    with torch.no_grad():
        trainer.distiller.head.logit.bias.fill_(float("nan"))
    before = [tensor.clone() for tensor in trainer.average.averages]
    trainer.iterate(0)
    assert trainer.student.num_skipped == 1
    assert trainer.average.num_updates == 0
    assert all(map(torch.equal, before, trainer.average.averages))


def test_too_many_in_a_row_stop_the_run_and_name_side_iteration_and_cause(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run", training__max_nonfinite_in_a_row=2)
    with torch.no_grad():
        trainer.distiller.unet.parameters_of("critic")[1][0, 0] = float("nan")
    trainer.iterate(3)
    with pytest.raises(
        FloatingPointError,
        match=r"critic's update was skipped 2 times in a row, the last at iteration 5: loss/",
    ):
        trainer.iterate(5)


# -- how the global batch is split -----------------------------------------------------------------


def gradients_of_first_iteration(directory: Path, batch: int, accumulated: int) -> torch.Tensor:
    """What both optimizers are given: (all parameters,)."""
    trainer = trainer_in(
        directory, training__batch_size=batch, training__gradient_accumulation_steps=accumulated
    )
    seen: list[torch.Tensor] = []
    for update in (trainer.student, trainer.critic):
        update.optimizer.register_step_pre_hook(
            lambda *_, update=update: seen.extend(p.grad.flatten() for p in update.parameters)
        )
    trainer.iterate(0)
    return torch.cat(seen)


@pytest.mark.parametrize(("batch", "accumulated"), [(2, 2), (1, 4)])
def test_accumulated_micro_batches_are_the_same_update_as_one_batch(
    tmp_path: Path, batch: int, accumulated: int
) -> None:
    whole = gradients_of_first_iteration(tmp_path / "whole", 4, 1)
    parts = gradients_of_first_iteration(tmp_path / "parts", batch, accumulated)
    # Data and noise are equal bit for bit; only the order of float32 sums differs.
    assert (whole - parts).norm() < 1e-5 * whole.norm()
    assert torch.equal(whole == 0, parts == 0)


def test_samples_of_one_iteration_have_different_noise(tmp_path: Path) -> None:
    trainer = trainer_in(tmp_path / "run")
    seen = []
    for micro in range(2):
        _, draws = trainer._batch_and_draws(0, micro)
        seen += [torch.randn(4, generator=generator).tolist() for generator in draws]
    assert len({tuple(row) for row in seen}) == 2
