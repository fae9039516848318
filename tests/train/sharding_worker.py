"""The work of one of two processes in test_sharding.py: training of full weights."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.train.tiny import SMALL, demo_config, real_latents, small_trainer
from train_lora.checkpoint import read_state, restore, tensors_of
from train_lora.loop import Trainer
from train_lora.sharding import check_sharding, local
from train_lora.stop import TrainingStopped

FULL = {
    "student__kind": "full",
    "critic__kind": "full",
    "critic__rank": None,
    "critic__updates_per_generator": 2,
    "training__gradient_checkpointing": "true",
    "checkpoint__keep_last": 9,
}


def full_trainer(folder: Path, batch_size: int, accumulated: int) -> Trainer:
    split = {
        "training__batch_size": batch_size,
        "training__gradient_accumulation_steps": accumulated,
    }
    return small_trainer(folder / "run", **FULL, **split)


def iterate(trainer: Trainer, count: int) -> list[float]:
    """So many iterations, then a checkpoint; returns the gradients' norms."""
    norms = []
    for _ in range(count):
        figures = trainer.iterate(trainer.iteration)
        trainer.iteration += 1
        norms += [float(v) for name, v in figures.items() if name.startswith("gradient_norm")]
    trainer.save()
    return norms


def stopped_in_iteration(trainer: Trainer, iteration: int, *, by_this_process: bool) -> str:
    """What `run` says when one process gets SIGTERM while that iteration computes."""

    def send(*_: object) -> None:
        if by_this_process and trainer.iteration == iteration:
            os.kill(os.getpid(), signal.SIGTERM)

    hook = trainer.critic.optimizer.register_step_pre_hook(send)
    try:
        trainer.run()
    except TrainingStopped as stop:
        return str(stop)
    finally:
        hook.remove()
    return ""


def own_state(trainer: Trainer) -> dict[str, Tensor]:
    """All that this process holds of the training, as copies."""
    return {
        f"{file}/{name}": local(tensor.detach()).clone()
        for file, part in tensors_of(trainer).items()
        for name, tensor in part.items()
    }


def different(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    """Names of what is not equal bit for bit."""
    assert set(one) == set(other)
    return [name for name in one if not torch.equal(one[name], other[name])]


def draw(trainer: Trainer) -> Tensor:
    """Validation's latents, in three pieces: one of two processes draws one of them in vain."""
    rows = -(-len(trainer.validation.condition) // 3)
    with mock.patch("train_lora.validate.rows_at_once", return_value=rows):
        return trainer.validation._draw("student", trainer.distiller.plan)


def refusal(**changes: str) -> str:
    settings = {key: value for key, value in (SMALL | FULL).items() if value is not None}
    try:
        check_sharding(demo_config(Path("run"), **settings, **changes))
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    """Leaves a run in `folder`/run, and what this process has seen in `folder`/RANK.json."""
    trainer = full_trainer(folder, 1, 2)
    rank = trainer.accelerator.process_index
    parameters = trainer.distiller.unet.parameters_of("student")
    result = {
        "processes": trainer.accelerator.num_processes,
        "elements_held": sum(local(p).numel() for p in parameters),
        "elements": sum(p.numel() for p in parameters),
        "refusals": [
            refusal(training__optimizer="adamw8bit"),
            refusal(training__compile="true"),
            refusal(),
        ],
        "norms": iterate(trainer, 1) + iterate(trainer, 1),
        "stopped": stopped_in_iteration(trainer, 3, by_this_process=rank == 1),
    }
    trainer.export(folder / "run" / "lora.safetensors")
    latents = draw(trainer)
    if rank == 0:
        save_file({"latents": latents}, folder / "drawn.safetensors")

    resumed = full_trainer(folder, 1, 2)
    checkpoint = folder / "run" / "checkpoints" / "000002"
    restore(resumed, checkpoint, read_state(checkpoint))
    resumed.iterate(2)
    resumed.iterate(3)
    result["different_when_resumed"] = different(own_state(trainer), own_state(resumed))

    before = own_state(trainer)
    if rank == 1:
        real_latents(trainer).fill_(float("inf"))
    trainer.iterate(5)
    result["skipped"] = trainer.critic.num_skipped
    result["changed_by_skipped"] = different(before, own_state(trainer))
    (folder / f"{rank}.json").write_text(json.dumps(result))
