"""What processes of their own record: test_watch_processes.py, test_monitor.py."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from PIL import Image

from tests.train.tiny import small_trainer, weights
from train_lora import validate
from train_lora.config_load import load
from train_lora.loop import Trainer
from train_lora.models.roles import STUDENT
from train_lora.monitor import Monitor
from train_lora.panels import panel_rows
from train_lora.validate import ValidationResult
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
    """Leaves a run in `folder`/run, and what this process has seen in `folder`/RANK.json."""
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


def record(run: Path, first: int) -> None:
    """Two iterations and a picture for W&B, of a run that goes on after `first` iterations."""
    overrides = [("output.directory", str(run)), ("logging.every", "1")]
    config = load(preset="demo", overrides=[*overrides, ("logging.trackers", "wandb")]).config
    with Monitor(config, Accelerator(cpu=True), first_iteration=first) as monitor:
        for done in range(first + 1, first + 3):
            monitor.note(done, {"loss/critic": torch.tensor(float(done))}, seconds=1.0)
        pictures = {"samples": Image.new("RGB", (8, 8))}
        monitor.validated(first + 2, ValidationResult(figures={}, pictures=pictures))
