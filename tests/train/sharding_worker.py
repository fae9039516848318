"""The work of one of two processes in test_sharding.py: training of full weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from tests.train.tiny import SMALL, demo_config, real_latents, small_trainer
from train_lora.checkpoint import read_state, restore, tensors_of
from train_lora.loop import Trainer
from train_lora.sharding import check_sharding, local

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
        "norms": iterate(trainer, 1) + iterate(trainer, 1) + iterate(trainer, 2),
    }
    trainer.export(folder / "run" / "lora.safetensors")

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
