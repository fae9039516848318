"""Trainings that between them use every option: the models and data they read, and their settings.

Each is `dmd2 train` from a preset made small, for one iteration.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from dmd2_core import VPSchedule
from tests.train import hasty
from tests.train.picture_files import (
    CAPTIONS,
    captioned_folder,
    metadata_folder,
    picture_bytes,
    tar_folder,
)
from tests.train.tiny import student_file
from tests.train.tiny_edm import SIDE_PX, class_folder, write_teacher
from tests.train.tiny_sd15 import random_sd15
from train_lora.demo.teacher import load_teacher
from train_lora.models.saving import save_diffusers_folder, save_single_file

SQUARE = [(128, 128)] * 4
WIDE = [(320, 192)] * 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One training; {} in a value stands for the folder that `write_inputs` filled."""

    preset: str
    settings: dict[str, Any]
    prepares: bool = False
    """Whether `dmd2 prepare` is run first."""
    environment: dict[str, str] = field(default_factory=dict)
    needs: Sequence[str] = ()
    """Libraries."""
    prediction: str = "epsilon"
    timesteps: Sequence[int] = (999, 749, 499, 249)
    conditioning_timestep: int | None = None
    tolerance: float = 1e-6
    """Of the gradient. Each pass is the same bit for bit; only sums are in another order."""


RECIPES = {
    "diffusers folder, prepared, 8-bit AdamW": Recipe(
        preset="sdxl-4step-12gb",  # with gradient checkpointing and bf16
        needs=["bitsandbytes", "wandb"],
        prepares=True,
        environment={"WANDB_MODE": "offline"},
        settings={
            "model.path": "{}/dmd2_demo_teacher",
            "model.base_precision": "fp16",
            "data.prompts": "{}/prompts.jsonl",
            "data.prompt_column": "words",
            "data.real_images": "{}/folder",
            "data.sizes": '["128x128", "160x96"]',
            "data.size_ids": "image",
            "data.min_size_px": 96,
            "data.skip_small_buckets": "true",
            "gan.features": "teacher",
            "gan.layers": "all",
            "student.rank": 32,  # states of 4096 numbers and more are in 8 bits
            "validation.every": 1,
            "validation.num_prompts": 1,
            "logging.every": 1,
            "logging.trackers": '["tensorboard", "wandb"]',
            "export.names": "diffusers",
        },
    ),
    "single file of v with zero SNR, full critic, text online": Recipe(
        preset="sdxl-4step-24gb",
        prediction="v",
        timesteps=(999, 600),
        settings={
            "model.path": "{}/v.safetensors",
            "data.prompts": "{}/prompts.csv",
            "data.real_images": "{}/tars",
            "data.text": "online",
            "critic.kind": "full",
            "critic.rank": None,
            "critic.alpha": None,
            "gan.layers": "down1,middle",
            "gan.shared_draw": "true",
            "sampling.steps": None,
            "sampling.timesteps": "[999, 600]",
            "training.mixed_precision": "no",
            "training.gradient_checkpointing": "false",
            "training.learning_rate_decay": 1.0,
            "training.ema_decay": 0,
        },
    ),
    "hub id, 4-bit base, warm start": Recipe(
        preset="sdxl-4step-16gb",
        needs=["bitsandbytes", "pyarrow"],
        settings={
            "model.path": "org/teacher",
            "model.base_precision": "4bit",
            "data.prompts": "{}/prompts.parquet",
            "data.real_images": "{}/metadata",
            "student.init": "{}/few.safetensors",
            "critic.loss_space": "velocity",
            "gan.r1_weight": 100.0,
            "gan.r1_noise": 0.1,
            "distribution_matching.divergence": "jensen-shannon",
            "critic.betas": "[0, 0.99]",
            "distribution_matching.guidance_timesteps": "above",
            "distribution_matching.guidance_weight": 0.5,
            "export.thumbnail": "false",
        },
    ),
    "single file, streamed images, compiled": Recipe(
        preset="sdxl-1step",
        needs=["datasets"],
        timesteps=(999,),
        conditioning_timestep=399,
        settings={
            "model.path": "{}/dmd2_demo_teacher.safetensors",
            "regression.warmup_iterations": 0,  # test_regression.py has one
            "data.prompts": "{}/saved",
            "data.real_images": "hub:someone/pictures",
            "data.stream": "true",
            "backward_simulation.enabled": "false",
            "training.compile": "true",
            "training.mixed_precision": "no",
            "training.gradient_checkpointing": "false",
            "logging.trackers": "[]",
        },
    ),
    "parquet, 8-bit base": Recipe(
        preset="sdxl-4step",
        needs=["bitsandbytes", "pyarrow"],
        settings={
            "model.path": "{}/dmd2_demo_teacher",
            "model.prediction": "epsilon",
            "model.base_precision": "8bit",
            "data.prompts": "{}/prompts.txt",
            "data.real_images": "{}/rows",
            "data.caption_column": "caption",
            "diversity_anchor.weight": 0.05,
            "diversity_anchor.timestep": 499,
            "diversity_anchor.teacher_steps": 2,
            "data.image_column": "image",
            "sampling.random_steps": "[2, 6]",
        },
    ),
    "SD1.5 single file, images by the teacher": Recipe(
        preset="sd15-1step-stage2",
        timesteps=(999,),
        conditioning_timestep=399,
        settings={
            "model.path": "{}/sd15.safetensors",
            "data.prompts": "{}/prompts.txt",
            "data.real_images": "teacher",
            "data.teacher_images": 2,
            "data.resolution_px": 256,
            "training.continue_from": "none",  # test_stages.py: from a run
            "training.batch_size": 1,
            "training.mixed_precision": "no",
            "training.gradient_checkpointing": "false",
            "model.base_precision": "fp32",
        },
    ),
    "SD1.5 folder, full student, without GAN": Recipe(
        preset="sd15-1step-stage1",
        # Sharded, gradients meet at the skip connections in another order: 1e-6 in float32,
        # thousands of times that in bf16.
        tolerance=3e-3,
        timesteps=(999,),
        conditioning_timestep=399,
        settings={
            "model.path": "{}/sd15",
            "data.prompts": "{}/prompts.txt",
            "data.real_images": None,
            "data.resolution_px": 128,
            "data.sizes": '["128x128", "160x96"]',
            "student.kind": "full",
            "student.alpha": None,
            "model.base_precision": "bf16",
        },
    ),
}

OF_CLASSES = {
    "model.path": "{}/edm.safetensors",
    "data.resolution_px": SIDE_PX,
    "student.rank": None,
    "critic.rank": None,
}
IN_BF16 = 3e-3  # as of the other sharded student
RECIPES["EDM of classes"] = Recipe(
    preset="imagenet64",
    prediction="sample",
    timesteps=(999,),
    tolerance=IN_BF16,
    settings=OF_CLASSES | {"data.real_images": "{}/classes", "data.min_size_px": 4},
)
RECIPES["EDM of classes, all layers"] = Recipe(
    preset="imagenet64-long-stage2",
    prediction="sample",
    timesteps=(999,),
    # Critic and teacher are equal but for rounding, so the gradient is small against bf16's 4e-3.
    tolerance=1e-2,
    settings=OF_CLASSES
    | {
        "data.real_images": "{}/classes",
        "gan.layers": '["all"]',
        "gan.shared_draw": "true",
        "training.continue_from": "none",  # test_imagenet.py: from a run
    },
)
RECIPES["EDM of classes, without GAN"] = Recipe(
    preset="imagenet64-long-stage1",
    prediction="sample",
    timesteps=(999,),
    tolerance=IN_BF16,
    settings=OF_CLASSES
    | {
        "model.base_precision": "bf16",  # else the critic is the teacher at first
        "validation.every": 1,
        "validation.num_prompts": 2,
    },
)


def write_inputs(folder: Path) -> Path:
    """All that the recipes read; returns the folder."""
    assert hasty.main(["teacher", "--out", str(folder)]) == 0  # a folder and a file
    teacher, schedule = load_teacher(), VPSchedule.sdxl().zero_terminal_snr()
    predicting_v = replace(teacher, prediction="v", schedule=schedule)
    save_single_file(predicting_v, folder / "v.safetensors", dtype=torch.float32)
    snapshot = folder / "hub" / "models--org--teacher" / "snapshots" / ("0" * 40)
    save_diffusers_folder(teacher, snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    student_file(folder / "few.safetensors", components=teacher)
    save_single_file(random_sd15(), folder / "sd15.safetensors", dtype=torch.float32)
    save_diffusers_folder(random_sd15(), folder / "sd15")

    (folder / "prompts.txt").write_text("\n".join(CAPTIONS))
    rows = "".join(f'{{"id": {n}, "words": "{words}"}}\n' for n, words in enumerate(CAPTIONS))
    (folder / "prompts.jsonl").write_text(rows)
    (folder / "prompts.csv").write_text("id,prompt\n" + "".join(f"1,{c}\n" for c in CAPTIONS))
    captioned_folder(folder / "folder", SQUARE + WIDE + [(90, 90)])
    metadata_folder(folder / "metadata", 4)
    tar_folder(folder / "tars", 4)
    write_teacher(folder / "edm.safetensors", iterations=5)
    class_folder(folder / "classes")
    return folder


def write_tables(folder: Path) -> None:
    """What only the libraries of '.[data]' can write and read."""
    import datasets
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": list(CAPTIONS)}), folder / "prompts.parquet")
    pictures = [{"bytes": picture_bytes(n), "path": None} for n in range(4)]
    kinds = {"image": datasets.Image(), "caption": datasets.Value("string")}
    table = datasets.Dataset.from_dict(
        {"image": pictures, "caption": list(CAPTIONS)}, features=datasets.Features(kinds)
    )
    table.save_to_disk(folder / "saved")
    table.to_parquet(folder / "rows" / "train-00000.parquet")


def command(recipe: Recipe, inputs: Path, output: Path, *, alone: bool) -> list[str]:
    """Of `dmd2 train`: two micro-batches of 2 in one process, or one in each of two."""
    small: dict[str, Any] = {
        "output.directory": output,
        "data.resolution_px": 128,
        "student.rank": 2,
        "critic.rank": 2,
        "critic.warmup_iterations": 0,
        "training.iterations": 1,
        "training.batch_size": 2,
        "training.gradient_accumulation_steps": 2 if alone else 1,
        "validation.every": 0,
    }
    if recipe.prepares:
        small["data.cache"] = output.with_name(f"{output.name}_cache")
    values = small | recipe.settings
    words = [f"--{k}={str(v).format(inputs)}" for k, v in values.items() if v is not None]
    return ["train", "--preset", recipe.preset, *words]


def run(argv: Sequence[str], inputs: Path) -> int:
    """A command of `dmd2`, which finds org/teacher in the hub's cache and someone/pictures in
    place of the hub."""
    with ExitStack() as stack:
        cache = str(inputs / "hub")
        stack.enter_context(mock.patch("huggingface_hub.constants.HF_HUB_CACHE", cache))
        if find_spec("datasets") is not None:
            import datasets

            load = partial(datasets.load_dataset, str(inputs / "rows"))

            def from_folder(name: str, **options: Any) -> Any:
                assert name == "someone/pictures"
                return load(**options, cache_dir=str(inputs / "datasets"))

            stack.enter_context(mock.patch.object(datasets, "load_dataset", from_folder))
        return hasty.main(argv)
