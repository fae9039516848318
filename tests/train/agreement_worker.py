"""The work of one of two processes in test_processes.py."""

from __future__ import annotations

import json
import resource
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.train.tiny import real_latents, small_trainer, weights
from train_lora import cli

LONGEST_FILE = 100_000
"""Bytes: more than configuration and records have, less than weights."""


def without_room(argv: Sequence[str]) -> int:
    """`dmd2`, but the system refuses to write long files."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (LONGEST_FILE, LONGEST_FILE))
    return cli.main(argv)


def each_of(commands: Sequence[Sequence[str]]) -> int:
    """The commands of `dmd2` in turn; prints their exit codes."""
    for argv in commands:
        print(cli.main(argv), flush=True)
    return 0


def main(folder: Path) -> None:
    """What the two share, and how they skip and stop together; writes RANK.json into `folder`."""
    trainer = small_trainer(
        folder / "run", critic__updates_per_generator=1, training__max_nonfinite_in_a_row=2
    )
    rank = trainer.accelerator.process_index
    _, draws = trainer._batch_and_draws(0, 0)
    result = {
        "processes": trainer.accelerator.num_processes,
        "steps": [trainer.step_index(iteration) for iteration in range(30)],
        "noise": [torch.randn((), generator=generator).item() for generator in draws],
    }
    trainer.iterate(0)
    before = weights(trainer, "critic")
    latents = real_latents(trainer)
    kept = latents.clone()
    if rank == 1:
        latents.fill_(float("inf"))
    trainer.iterate(1)
    result["skipped_bad_gradient"] = trainer.critic.num_skipped
    result["critic_unchanged"] = torch.equal(before, weights(trainer, "critic"))
    result["student_skipped"] = trainer.student.num_skipped

    latents.copy_(kept)  # a loss alone, with gradients of zero
    trainer.critic.apply(1, losses_finite=rank == 0)
    result["skipped_bad_loss"] = trainer.critic.num_skipped
    trainer.iterate(2)
    result["critic_moved"] = not torch.equal(before, weights(trainer, "critic"))
    result["weights"] = weights(trainer, "critic").double().sum().item()

    if rank == 1:
        latents.fill_(float("inf"))
    result["stop"] = ""
    for iteration in (3, 4):
        try:
            trainer.iterate(iteration)
        except FloatingPointError as error:
            result["stop"] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(result))
