"""Peak memory and seconds of a training iteration, on a full-size model with random weights.

    python -m benchmarks.full_iteration --preset sdxl-4step-12gb
    python -m benchmarks.full_iteration --preset sdxl-4step-16gb --student.rank 128 --batch-size 2
    python -m benchmarks.full_iteration --preset sdxl-4step-12gb --plan
    python -m benchmarks.full_iteration --preset sdxl-4step-12gb --model tiny

The trainer's own classes run, on random data; nothing is downloaded. `--plan` needs no GPU: it
counts bytes without having them (memory_plan.py). `--model tiny` runs the embedded teacher.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from train_lora.cli import pair_overrides
from train_lora.config import Config
from train_lora.config_load import load, load_unfinished
from train_lora.data.training_data import TrainingData
from train_lora.demo.run import peak_memory_mb
from train_lora.demo.teacher import load_teacher
from train_lora.distill import RealImages
from train_lora.distributed import join_processes
from train_lora.loop import Trainer
from train_lora.model_setup import base_precision, build_trainable_unet
from train_lora.models.components import Components
from train_lora.models.precision import DTYPES, import_bitsandbytes
from train_lora.models.text import LATENT_PX, Condition, size_ids
from train_lora.trainer import build_trainer

from .memory_plan import memory_plan
from .random_model import random_components

GIB = 2**30
TINY_PX = 128


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    peak_gib: float
    reserved_gib: float | None
    """What torch's allocator held; None on the CPU, where the process is measured."""
    seconds: float | None


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Peak memory and seconds of one training iteration, with random weights.",
        epilog="Further options are those of dmd2 train: --key value.",
        allow_abbrev=False,
    )
    parser.add_argument("--preset", help="values to start from: see dmd2 config --presets")
    parser.add_argument("--model", choices=("sdxl", "sd15", "tiny"), help="default: the preset's")
    parser.add_argument("--repeat", type=int, default=3, help="timed iterations of each kind (3)")
    parser.add_argument("--plan", action="store_true", help="count the bytes, run nothing")
    arguments, rest = parser.parse_known_args(argv)
    import_bitsandbytes()  # in silence, before diffusers does it
    kind = arguments.model or ("sd15" if (arguments.preset or "").startswith("sd15") else "sdxl")
    with tempfile.TemporaryDirectory() as folder:
        try:
            config = benchmark_config(arguments.preset, pair_overrides(rest), kind, Path(folder))
            if arguments.plan:
                print(memory_plan(config, kind))
                return 0
            print(measure(config, kind, max(1, arguments.repeat)))
        except ValueError as error:
            parser.error(str(error))
    return 0


def benchmark_config(
    preset: str | None, overrides: Sequence[tuple[str, str]], kind: str, folder: Path
) -> Config:
    """The preset without anything that reads or writes files; `overrides` win over all."""
    data = 'prompts = "random.txt"\n'
    if load_unfinished(preset=preset, overrides=overrides).config.needs_real_images:
        data += 'real_images = "random"\n'
    if kind == "tiny":
        data += f"resolution_px = {TINY_PX}\n"
    file = folder / "benchmark.toml"
    file.write_text(
        f'[model]\npath = "random"\n[data]\n{data}[output]\ndirectory = "unused"\n'
        "[validation]\nevery = 0\n[export]\nthumbnail = false\n[logging]\ntrackers = []\n"
        '[training]\ncontinue_from = "none"\n'
    )
    return load(preset=preset, file=file, overrides=overrides).config


def measure(config: Config, kind: str, repeat: int) -> str:
    """The markdown table of both kinds of iteration."""
    accelerator = join_processes(config.training.mixed_precision)
    device = accelerator.device
    if kind == "tiny":
        components = load_teacher()
    else:
        full = "full" in (config.student.kind, config.critic.kind)
        dtype = torch.float32 if full else DTYPES[base_precision(config, device)]
        components = random_components("sd15" if kind == "sd15" else "sdxl", dtype)
    data = random_data(config, components, device)
    unet = build_trainable_unet(config, components, device, warm=False)
    trainer = build_trainer(config, components, data, accelerator, unet)
    rows = [_measured("after loading", device, 0, lambda _: None)]
    every, first = config.critic.updates_per_generator, config.critic.warmup_iterations
    rows.append(
        _measured(
            "student and critic update", device, repeat,
            lambda number: trainer.iterate(first + number * every),
        )
    )  # fmt: skip
    if every > 1:
        rows.append(
            _measured(
                "critic update alone", device, repeat,
                lambda number: trainer.iterate(first + number * every + 1),
            )
        )  # fmt: skip
    _check_nothing_skipped(trainer)
    return _table(rows, device, config, kind)


def random_data(config: Config, components: Components, device: torch.device) -> TrainingData:
    """As many prompts and real images as an iteration takes, of the square size."""
    generator = torch.Generator().manual_seed(0)
    count = config.training.batch_size * config.training.gradient_accumulation_steps
    px, unet = config.data.resolution_px, components.unet.config
    pooled = 0
    if components.kind == "sdxl":
        pooled = components.text_encoders[1].config.projection_dim

    def condition() -> Condition:
        return Condition(
            hidden=torch.randn(count, 77, unet.cross_attention_dim, generator=generator),
            pooled=torch.randn(count, pooled, generator=generator),
            time_ids=size_ids(count, px, px),
        ).to(device)

    side = px // LATENT_PX
    latents = torch.randn(count, unet.in_channels, side, side, generator=generator)
    real = RealImages(latents=latents.to(device), condition=condition())
    captions = [f"caption {number}" for number in range(count)]
    return TrainingData.in_memory(captions=captions, condition=condition(), real=real)


def _measured(what: str, device: torch.device, repeat: int, run: Callable[[int], object]) -> Row:
    """Once untimed (allocations, optimizer states, compilation), then the mean of `repeat`."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    run(0)
    if on_gpu:
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    for number in range(1, repeat + 1):
        run(number)
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = (time.perf_counter() - started) / repeat if repeat else None
    if not on_gpu:
        return Row(what=what, peak_gib=peak_memory_mb() / 1024, reserved_gib=None, seconds=seconds)
    return Row(
        what=what,
        peak_gib=torch.cuda.max_memory_allocated(device) / GIB,
        reserved_gib=torch.cuda.max_memory_reserved(device) / GIB,
        seconds=seconds,
    )


def _check_nothing_skipped(trainer: Trainer) -> None:
    skipped = trainer.student.num_skipped + trainer.critic.num_skipped
    if skipped:
        raise ValueError(f"{skipped} updates were not finite and skipped: the figures mean nothing")


def _table(rows: Sequence[Row], device: torch.device, config: Config, kind: str) -> str:
    training = config.training
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak = "peak allocated" if device.type == "cuda" else "process's peak"
    lines = [
        f"{kind}, {config.data.resolution_px} px, batch {training.batch_size} x "
        f"{training.gradient_accumulation_steps}, rank {config.student.rank}, "
        f"{training.optimizer}, base {base_precision(config, device)}, checkpointing "
        f"{'on' if training.gradient_checkpointing else 'off'}; {where}, torch {torch.__version__}",
        "",
        f"| | {peak}, GiB | reserved, GiB | seconds |",
        "|---|---|---|---|",
    ]
    for row in rows:
        reserved = "" if row.reserved_gib is None else f"{row.reserved_gib:.2f}"
        seconds = "" if row.seconds is None else f"{row.seconds:.2f}"
        lines.append(f"| {row.what} | {row.peak_gib:.2f} | {reserved} | {seconds} |")
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = (total - free) / GIB
        lines += ["", f"In use on the GPU at the end, driver included: {used:.2f} GiB."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
