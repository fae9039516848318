"""One of two processes, started by test_watch_processes.py: records and validation of both.

Writes RANK.json into the folder given as the only argument.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from tests.train.tiny import small_trainer, weights
from train_lora import validate
from train_lora.window import FigureWindow


def main(folder: Path) -> None:
    validate.TEACHER_STEPS = 2
    trainer = small_trainer(
        folder / "run",
        validation__every=1,
        validation__num_prompts=2,
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
    found = {
        "processes": trainer.accelerator.num_processes,
        "means": means,
        "results": [result is not None for result in results],
        "saved": trainer.saved_iteration,
        "weights": weights(trainer, "student").double().sum().item(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
