"""`dmd2` that writes down what a training starts from, for test_stages.py."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from unittest import mock

from safetensors.torch import save_file

from tests.train import hasty
from train_lora.checkpoint import tensors_of
from train_lora.loop import Trainer
from train_lora.sharding import to_main


def main(argv: Sequence[str], folder: Path) -> int:
    """The command; `folder` gets the networks before the first iteration, as checkpoints hold them,
    and the number of values that the optimizers and the trainer remember, which is 0."""
    run = Trainer.run

    def noted(trainer: Trainer) -> None:
        folder.mkdir(exist_ok=True)
        for name, part in tensors_of(trainer).items():
            whole = to_main(part)
            if trainer.accelerator.is_main_process:
                save_file({n: t.clone() for n, t in whole.items()}, folder / f"{name}.safetensors")
        rank = trainer.accelerator.process_index
        counters = [trainer.iteration, trainer.saved_iteration, trainer.seconds_training]
        counters += [
            u.num_skipped + len(u.optimizer.state) for u in (trainer.student, trainer.critic)
        ]
        (folder / f"counters_{rank}.txt").write_text(str(sum(counters)))
        run(trainer)

    with mock.patch.object(Trainer, "run", noted):
        return hasty.main(argv)
