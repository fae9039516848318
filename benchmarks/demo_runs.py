"""Trainings of the demo's teacher under varied settings, measured alike: what the studies share.

One run is one folder: lora.safetensors and result.json, which is written last, so that a study that
was stopped goes on with the runs that have none.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from dmd2_core import derived_seed
from train_lora.config import Config
from train_lora.config_load import load
from train_lora.data.training_data import encode_captions, load_training_data
from train_lora.demo import scenes
from train_lora.demo.classifier import SceneClassifier, load_classifier
from train_lora.demo.measure import PROMPT_SEED, build_yardstick, evaluation_scenes
from train_lora.demo.run import SAMPLE_SEED, System, renderer
from train_lora.distributed import join_processes
from train_lora.export import shared_unet_with_lora
from train_lora.metrics.frechet import frechet_distance
from train_lora.metrics.looks import looks
from train_lora.model_setup import build_trainable_unet, load_model
from train_lora.models.components import Components
from train_lora.models.roles import STUDENT, SharedUNet
from train_lora.prepare import make_pairs
from train_lora.sampling import decode_latents, sample_latents
from train_lora.trainer import Trainer, build_trainer, place

LORA, RESULT = "lora.safetensors", "result.json"
NUM_WATCHED, WATCH_EVERY, WATCH_SEED = 8, 4, 77
PATCH_PX, NUM_REAL_FOR_PATCHES = 64, 512
PATCH_SEED = derived_seed(103)


@dataclass(frozen=True, kw_only=True, slots=True)
class Seeds:
    """Of what is measured; what chooses by the figures takes others than what reports them."""

    prompts: int
    noise: int


REPORTED = Seeds(prompts=PROMPT_SEED, noise=SAMPLE_SEED)

Settings = Mapping[str, str]
"""Configuration key -> value as on the command line, over the demo's preset."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One training: a variant with one seed."""

    variant: str
    seed: int
    settings: Settings
    watched: bool = False
    """Whether the brightness of the student's pictures is followed while it trains."""

    def folder(self, out: Path) -> Path:
        return out / self.variant / f"seed{self.seed}"

    def result(self, out: Path) -> dict[str, Any]:
        """What `measure` found; FileNotFoundError before that."""
        return read_result(self.folder(out))

    def config(self, out: Path) -> Config:
        values = {
            **self.settings,
            "output.directory": str(self.folder(out)),
            "training.seed": str(self.seed),
        }
        return load(preset="demo", overrides=list(values.items())).config


def run_all(runs: Sequence[Run], module: str, out: Path, workers: int) -> None:
    """Those without a result, each by `python -m MODULE --one VARIANT SEED --out OUT`.

    Processes of one thread each: on few cores quicker than one training on all of them.
    """

    def run(one: Run) -> None:
        one_run = ["--one", one.variant, str(one.seed)]
        command = [sys.executable, "-m", module, "--out", str(out), *one_run]
        folder = one.folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        print(f"{one.variant}, seed {one.seed}", flush=True)
        with (folder / "log.txt").open("w", encoding="utf-8") as log:
            subprocess.run(command, check=True, stdout=log, stderr=subprocess.STDOUT)

    left = [one for one in runs if not (one.folder(out) / RESULT).exists()]
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(run, left))


def train_and_measure(run: Run, out: Path, seeds: Seeds = REPORTED) -> None:
    """Train, export, measure the file, and write what came out."""
    torch.set_num_threads(1)
    folder, config = run.folder(out), run.config(out)
    folder.mkdir(parents=True, exist_ok=True)
    if config.needs_pairs:
        make_pairs(config)
    started = time.perf_counter()
    brightness = train(config, folder / LORA, watched=run.watched)
    seconds = time.perf_counter() - started
    result = {
        "settings": dict(run.settings),
        "seconds": round(seconds, 1),
        "brightness": brightness,
        **measure_lora(folder / LORA, seeds),
    }
    write_result(folder, result)


def write_result(folder: Path, result: Mapping[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def read_result(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return found


def read_or_measure(folder: Path, figures: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """What a folder holds; measured now where it holds nothing."""
    if not (folder / RESULT).exists():
        write_result(folder, figures())
    return read_result(folder)


def train(config: Config, lora: Path, *, watched: bool) -> list[tuple[int, float]]:
    """A training without a run folder; returns (iteration, brightness) where it is watched."""
    accelerator = join_processes(config.training.mixed_precision)
    components = load_model(config, accelerator.device)
    unet = build_trainable_unet(config, components, accelerator.device, warm=True)
    place(components, accelerator.device)
    data = load_training_data(config, components, num_processes=1, teacher=unet)
    trainer = build_trainer(config, components, data, accelerator, unet)
    brightness = []
    while trainer.iteration < config.training.iterations:
        trainer.iterate(trainer.iteration)
        trainer.iteration += 1
        if watched and trainer.iteration % WATCH_EVERY == 0:
            brightness.append((trainer.iteration, student_brightness(trainer)))
    trainer.export(lora)
    return brightness


def student_brightness(trainer: Trainer) -> float:
    """Mean luma, black 0 and white 1, of pictures of the same prompts and noise each time.

    Of the student itself, not of its average over time.
    """
    distiller = trainer.distiller
    condition = captions_condition(distiller.components, shown_captions(NUM_WATCHED))
    latents = sample_latents(
        distiller.unet, STUDENT, distiller.components, condition, distiller.plan, seed=WATCH_SEED
    )
    return looks(decode_latents(distiller.components, latents))["brightness"]


def shown_captions(count: int) -> list[str]:
    generator = torch.Generator().manual_seed(7)
    return [scene.caption for scene in scenes.random_scenes(count, generator)]


def captions_condition(components: Components, captions: Sequence[str]) -> Any:
    return encode_captions(components, list(captions), scenes.IMAGE_PX)


def measure_lora(lora: Path, seeds: Seeds = REPORTED) -> dict[str, float]:
    """The demo's figures of the exported file, applied to a teacher loaded afresh."""
    from train_lora.demo.teacher import load_teacher

    unet, recipe = shared_unet_with_lora(load_teacher().unet, lora)
    assert recipe is not None
    return measure(unet, load_teacher(), System(role=STUDENT, plan=recipe.plan()), seeds)


def measure(
    unet: SharedUNet, components: Components, system: System, seeds: Seeds = REPORTED
) -> dict[str, float]:
    """`SystemFigures` by name, and the distance of patches."""
    classifier = load_classifier()
    yardstick = build_yardstick(classifier, prompt_seed=seeds.prompts)
    condition = captions_condition(components, yardstick.captions)
    images = renderer(unet, components, system, condition, seeds.noise)()
    figures = asdict(yardstick.measure(lambda: images, system.network_evaluations))
    del figures["seconds_per_image"]  # drawn beforehand
    return {**figures, "patch_distance": patch_distance(classifier, images, seeds.prompts)}


@torch.no_grad()
def patch_distance(classifier: SceneClassifier, images: Tensor, prompt_seed: int) -> float:
    """Frechet distance of the pictures' quarters to those of real scenes of the same prompts.

    Each quarter is brought to the classifier's size: what counts is detail, not what the whole
    picture shows, as in the paper's patch FID.
    """
    prompts = evaluation_scenes(prompt_seed)
    generator = torch.Generator().manual_seed(PATCH_SEED)
    rounds = NUM_REAL_FOR_PATCHES // len(prompts)
    real = [patch_features(classifier, scenes.draw(prompts, generator)) for _ in range(rounds)]
    return frechet_distance(patch_features(classifier, images), torch.cat(real))


@torch.no_grad()
def patch_features(classifier: SceneClassifier, images: Tensor) -> Tensor:
    """images: (B, 3, 128, 128) in [-1, 1] -> (4 B, 64)."""
    quarters = [
        images[:, :, top : top + PATCH_PX, left : left + PATCH_PX]
        for top in range(0, scenes.IMAGE_PX, PATCH_PX)
        for left in range(0, scenes.IMAGE_PX, PATCH_PX)
    ]
    enlarged = interpolate(torch.cat(quarters), scenes.IMAGE_PX, mode="bilinear")
    return torch.cat([classifier.features(part) for part in enlarged.split(256)])


def mean_and_spread(values: Sequence[float], digits: int) -> str:
    """As a cell of a table: "26.9 ± 1.2", the sample standard deviation; one value has none."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
