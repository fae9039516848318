"""`dmd2 demo`: distil the embedded teacher, then show and measure what came out."""

from __future__ import annotations

import json
import platform
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmd2_core import StepPlan

from ..config_load import load
from ..data.training_data import encode_captions
from ..export import shared_unet_with_lora
from ..models.components import Components
from ..models.roles import STUDENT, TEACHER, SharedUNet
from ..models.text import Condition
from ..output import check_output_directory
from ..pictures import labelled_grid
from ..sampling import decode_latents, sample_latents
from ..trainer import place, train
from . import scenes
from .classifier import load_classifier
from .goals import shortfalls
from .measure import SystemFigures, build_yardstick
from .teacher import load_teacher

LORA_NAME, PICTURE_NAME, REPORT_NAME = (
    "dmd2_demo_4step.safetensors",
    "comparison.png",
    "report.json",
)
NUM_SHOWN = 10
# At 5 the teacher's shapes are the best (weights/README.md), as SDXL is used at 5 to 7. What the
# student is distilled with is another value, the preset's.
TEACHER_GUIDANCE = 5.0
SAMPLE_SEED = 1234
CHUNK = 32


@dataclass(frozen=True, kw_only=True, slots=True)
class System:
    """One way to make pictures: a role of the shared UNet with its steps."""

    role: str
    plan: StepPlan
    guidance: float = 1.0
    strength: float = 1.0

    @property
    def network_evaluations(self) -> int:
        return len(self.plan.timesteps) * (1 if self.guidance == 1.0 else 2)

    @property
    def label(self) -> str:
        return f"{self.role}, {len(self.plan.timesteps)} steps"


def run_demo(out: Path, seed: int = 0) -> None:
    """Train, export, measure; leaves the LoRA, comparison.png and report.json in `out`.

    What is measured is the exported file, read back and applied to a teacher loaded afresh.
    """
    from accelerate import PartialState

    out = check_output_directory(out, "--out")
    overrides = [("output.directory", str(out / "run")), ("training.seed", str(seed))]
    config = load(preset="demo", overrides=overrides).config
    result = train(config)
    lora = result.lora.rename(out / LORA_NAME)
    peak_mb = peak_memory_mb()  # of the distillation; the measurements come after it
    components = load_teacher()
    place(components, PartialState().device)
    unet, recipe = shared_unet_with_lora(components.unet, lora)
    assert recipe is not None
    systems = {
        "teacher_50": System(role=TEACHER, plan=StepPlan.evenly(50), strength=0.0,
                             guidance=TEACHER_GUIDANCE),
        "teacher_4": System(role=TEACHER, plan=StepPlan.evenly(4), strength=0.0,
                            guidance=TEACHER_GUIDANCE),
        "student_4": System(role=STUDENT, plan=recipe.plan()),
    }  # fmt: skip
    figures = measure_systems(unet, components, systems)
    draw_comparison(unet, components, systems, out / PICTURE_NAME)
    report: dict[str, Any] = {name: asdict(row) for name, row in figures.items()}
    missed = shortfalls(*(figures[name] for name in systems))
    report |= {
        "falls_short": missed,
        "train_seconds": round(result.seconds, 1),
        "peak_memory_mb": peak_mb,
        "seed": seed,
        "teacher_guidance": TEACHER_GUIDANCE,
        "distillation_guidance": config.distribution_matching.guidance,
        "machine": {
            "device": str(components.unet.device),
            "threads": torch.get_num_threads(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }
    (out / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_table(figures, result.seconds)
    for sentence in missed:
        print(f"falls short: {sentence}")
    for name in (LORA_NAME, PICTURE_NAME, REPORT_NAME):
        print(out / name)


def peak_memory_mb() -> int:
    """Largest resident memory of this process so far (ru_maxrss: KiB on Linux, bytes on macOS)."""
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit


def renderer(
    unet: SharedUNet,
    components: Components,
    system: System,
    condition: Condition,
    seed: int = SAMPLE_SEED,
) -> Callable[[], Tensor]:
    """A function that draws one picture for each row of the condition, in batches."""

    def render() -> Tensor:
        images = []
        for first in range(0, len(condition), CHUNK):
            latents = sample_latents(
                unet, system.role, components, condition[first : first + CHUNK], system.plan,
                seed=seed, first_index=first, guidance=system.guidance,
                strength=system.strength,
            )  # fmt: skip
            images.append(decode_latents(components, latents).cpu())
        return torch.cat(images)

    return render


def measure_systems(
    unet: SharedUNet, components: Components, systems: dict[str, System]
) -> dict[str, SystemFigures]:
    from tqdm import tqdm

    yardstick = build_yardstick(load_classifier())
    condition = encode_captions(components, yardstick.captions, scenes.IMAGE_PX)
    return {
        name: yardstick.measure(
            renderer(unet, components, system, condition), system.network_evaluations
        )
        for name, system in tqdm(systems.items(), desc="measuring")
    }


def draw_comparison(
    unet: SharedUNet, components: Components, systems: dict[str, System], path: Path
) -> None:
    """The systems' pictures for the same prompts and noise, one row each."""
    generator = torch.Generator().manual_seed(7)
    captions = [scene.caption for scene in scenes.random_scenes(NUM_SHOWN, generator)]
    condition = encode_captions(components, captions, scenes.IMAGE_PX)
    rows = [
        (
            f"{system.label}, {system.network_evaluations} network evaluations",
            renderer(unet, components, system, condition)(),
        )
        for system in systems.values()
    ]
    labelled_grid(rows, captions).save(path)


def print_table(figures: dict[str, SystemFigures], train_seconds: float) -> None:
    print(f"\n{'':12}{'Frechet':>10}{'prompt':>10}{'diversity':>11}{'network':>9}{'s/image':>9}")
    print(f"{'':12}{'distance':>10}{'accuracy':>10}{'':11}{'evals':>9}")
    for name, row in figures.items():
        print(
            f"{name:12}{row.frechet_distance:>10.2f}{row.prompt_accuracy:>10.3f}"
            f"{row.diversity:>11.2f}{row.network_evaluations:>9}{row.seconds_per_image:>9.3f}"
        )
    print(f"\ndistilled in {train_seconds:.0f} s\n")
