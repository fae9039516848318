"""One of two processes, started by test_watch_processes.py: records and validation of both.

Writes RANK.json into the folder given as the only argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import torch

from tests.train.tiny import small_trainer, weights
from train_lora import validate
from train_lora.loop import Trainer
from train_lora.models.roles import STUDENT
from train_lora.panels import panel_rows
from train_lora.window import FigureWindow


def drawn(trainer: Trainer) -> tuple[dict[str, torch.Tensor], int]:
    """What a validation draws, and how often this process calls the networks for it."""
    unet, validation, calls = trainer.distiller.unet, trainer.validation, []
    hook = unet.register_forward_hook(lambda *_: calls.append(1))
    latents = validation._draw(STUDENT, trainer.distiller.plan)
    rows = panel_rows(
        trainer.distiller, latents[:3], validation.condition[:3], seed=1, piece_rows=2
    )
    hook.remove()
    return dict(rows) | {"latents": latents}, len(calls)


def drawn_alone(trainer: Trainer) -> tuple[dict[str, torch.Tensor], int]:
    """The same by this process without the other."""
    with mock.patch("train_lora.distributed.several", return_value=False):
        return drawn(trainer)


def main(folder: Path) -> None:
    validate.TEACHER_STEPS, validate.rows_at_once = 2, lambda *_: 2
    trainer = small_trainer(
        folder / "run",
        validation__every=1,
        validation__num_prompts=2,
        validation__images_per_prompt=3,
        checkpoint__every=0,
        checkpoint__keep_last=1,
        critic__updates_per_generator=2,
        training__iterations=3,
        logging__every=3,
    )
    rank = trainer.accelerator.process_index
    window = FigureWindow()
    window.add({"loss": torch.tensor(1.0 + rank), "rare": torch.tensor(10.0 * rank)})
    window.add({"loss": torch.tensor(3.0 + rank)})
    window.add({"loss": torch.tensor(float("nan") if rank else 8.0)})
    means = window.take(trainer.accelerator.device)
    results = []
    run = trainer.validation.run
    trainer.validation.run = lambda: results.append(run()) or results[-1]  # type: ignore
    trainer.run()
    (shared, passes), (alone, all_passes) = drawn(trainer), drawn_alone(trainer)
    found = {
        "processes": trainer.accelerator.num_processes,
        "means": means,
        "results": [result is not None for result in results],
        "saved": trainer.saved_iteration,
        "passes": [passes, all_passes],
        "different": [n for n in alone if not torch.equal(alone[n], shared[n])],
        "weights": weights(trainer, "student").double().sum().item(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
