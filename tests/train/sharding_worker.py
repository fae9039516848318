"""Full weights trained by `small_trainer`, as one of two processes; started by test_sharding.py.

Leaves a run in FOLDER/run, and what this process has seen in FOLDER/RANK.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
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
    "training__gradient_accumulation_steps": 2,
    "training__gradient_checkpointing": "true",
    "checkpoint__keep_last": 9,
}


def full_trainer(folder: Path, batch_size: int) -> Trainer:
    return small_trainer(folder / "run", training__batch_size=batch_size, **FULL)


def iterate(trainer: Trainer, count: int) -> list[float]:
    """So many iterations, then a checkpoint; returns the gradients' norms."""
    norms = []
    for _ in range(count):
        figures = trainer.iterate(trainer.iteration)
        trainer.iteration += 1
        norms += [float(v) for name, v in figures.items() if name.startswith("gradient_norm")]
    trainer.save()
    return norms


def own_state(trainer: Trainer) -> list[Tensor]:
    """All that this process holds of the training, as copies."""
    parts = tensors_of(trainer).values()
    return [local(tensor.detach()).clone() for part in parts for tensor in part.values()]


def all_equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))


def refusal() -> str:
    settings = {key: value for key, value in (SMALL | FULL).items() if value is not None}
    try:
        check_sharding(demo_config(Path("run"), training__optimizer="adamw8bit", **settings))
    except ValueError as error:
        return str(error)
    return ""


def main(folder: Path) -> None:
    trainer = full_trainer(folder, batch_size=1)
    rank = trainer.accelerator.process_index
    parameters = trainer.distiller.unet.parameters_of("student")
    result = {
        "processes": trainer.accelerator.num_processes,
        "elements_held": sum(local(p).numel() for p in parameters),
        "elements": sum(p.numel() for p in parameters),
        "refusal": refusal(),
        "norms": iterate(trainer, 1) + iterate(trainer, 1) + iterate(trainer, 2),
    }
    trainer.export(folder / "run" / "lora.safetensors")

    resumed = full_trainer(folder, batch_size=1)
    checkpoint = folder / "run" / "checkpoints" / "000002"
    restore(resumed, checkpoint, read_state(checkpoint))
    resumed.iterate(2)
    resumed.iterate(3)
    result["resumed_equal"] = all_equal(own_state(trainer), own_state(resumed))

    before = own_state(trainer)
    if rank == 1:
        real_latents(trainer).fill_(float("inf"))
    trainer.iterate(5)
    result["skipped"] = trainer.critic.num_skipped
    result["unchanged"] = all_equal(before, own_state(trainer))
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
