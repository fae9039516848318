"""`training.objective = "dmd"` on the embedded teacher: better than the untrained student."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import Accelerator

from train_lora import prepare
from train_lora.config import Config
from train_lora.data.demo_data import demo_captions
from train_lora.data.training_data import load_training_data
from train_lora.demo.teacher import load_teacher
from train_lora.sampling import decode_latents
from train_lora.trainer import build_trainer

from .tiny import demo_config

COUNT = 8


def config_for(folder: Path, seed: int) -> Config:
    """Pairs of their own for each seed."""
    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(demo_captions(2 * COUNT)))
    return demo_config(
        folder / "run",
        training__objective="dmd",
        training__seed=seed,
        training__batch_size=COUNT,
        sampling__conditioning_timestep=399,
        regression__pairs=folder / f"pairs{seed}",
        regression__num_pairs=COUNT,
        regression__teacher_steps=4,
        student__learning_rate=2e-3,
        data__prompts=prompts,
        validation__every=0,
    )


def test_dmd_brings_unseen_noise_nearer_to_the_teachers_pictures(tmp_path: Path) -> None:
    """Of noise and captions whose pairs it was never shown, against the untrained student."""
    teacher = load_teacher()
    config, other = config_for(tmp_path, 0), config_for(tmp_path, 1)
    for one in (config, other):
        prepare.make_pairs(one)
    unseen = load_training_data(other, teacher).pair_batch(first=0, size=COUNT, seed=0)
    wanted = decode_latents(teacher, unseen.latents)
    data = load_training_data(config, teacher)
    trainer = build_trainer(config, teacher, data, Accelerator(cpu=True))

    @torch.no_grad()
    def error() -> float:
        with trainer.distiller.unet.role("student"):
            told = torch.full((COUNT,), 399)
            x0 = trainer.distiller.denoiser(unseen.noise, told, unseen.condition)
        return (decode_latents(teacher, x0) - wanted).square().mean().item()

    untrained = error()
    losses = [trainer.iterate(i) for i in range(6)]
    assert losses[-1]["loss/regression"] < 0.8 * losses[0]["loss/regression"]
    assert losses[-1]["loss/critic"] < losses[0]["loss/critic"]
    trained = error()
    assert trained < 0.9 * untrained, (untrained, trained)
