"""What processes of their own record: test_watch_processes.py, test_monitor.py."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image

from tests.train.tiny import small_trainer, weights
from train_lora import validate
from train_lora.config_load import load
from train_lora.monitor import Monitor
from train_lora.validate import ValidationResult
from train_lora.window import FigureWindow


def main(folder: Path) -> None:
    """Leaves a run in `folder`/run, and what this process has seen in `folder`/RANK.json."""
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


def record(run: Path, first: int) -> None:
    """Two iterations and a picture for W&B, of a run that goes on after `first` iterations."""
    overrides = [("output.directory", str(run)), ("logging.every", "1")]
    config = load(preset="demo", overrides=[*overrides, ("logging.trackers", "wandb")]).config
    with Monitor(config, Accelerator(cpu=True), first_iteration=first) as monitor:
        for done in range(first + 1, first + 3):
            monitor.note(done, {"loss/critic": torch.tensor(float(done))}, seconds=1.0)
        pictures = {"samples": Image.new("RGB", (8, 8))}
        monitor.validated(first + 2, ValidationResult(figures={}, pictures=pictures))
