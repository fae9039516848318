"""One of two processes, started by test_processes.py: what they share, and how they skip together.

Writes RANK.json into the folder given as the only argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.train.tiny import real_latents, small_trainer, weights


def main(folder: Path) -> None:
    trainer = small_trainer(folder / "run", critic__updates_per_generator=1)
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
    (folder / f"{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
