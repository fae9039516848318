"""Which options give a student the teacher's diversity back: short runs of the demo, measured.

    python benchmarks/diversity.py --out build/diversity --variants paper,anchor --seeds 0,1,2

Each run leaves its figures as a JSON file in the output folder, so that a command that was stopped,
or one that asks for more, trains only what is missing. Prompts and noise are others than those on
which the demo reports, since choices are made by these figures.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dmd2_core import StepPlan, derived_seed
from train_lora.config_load import load
from train_lora.demo.run import System, measure_systems
from train_lora.demo.teacher import load_teacher
from train_lora.export import shared_unet_with_lora
from train_lora.models.roles import STUDENT, TEACHER, SharedUNet
from train_lora.trainer import train

REDUCED = {"training.batch_size": "8", "training.iterations": "200", "validation.every": "0"}
"""The demo in about three minutes on one core."""

VARIANTS: dict[str, dict[str, str]] = {
    "paper": {},
    "anchor 0.05": {"diversity_anchor.weight": "0.05"},
    "anchor 0.5": {"diversity_anchor.weight": "0.5"},
    "anchor 0.5 to 499": {"diversity_anchor.weight": "0.5", "diversity_anchor.timestep": "499"},
    "guidance above": {"distribution_matching.guidance_timesteps": "above"},
    "guidance apart": {"distribution_matching.guidance_timesteps": "apart"},
}
"""Name -> what it changes in the reduced demo."""

TEACHERS = {"teacher, guidance 2": 2.0, "teacher, guidance 5": 5.0}
"""In 50 steps; the students are distilled with guidance 2."""

SEEDS = {"prompt_seed": derived_seed(103), "sample_seed": 4321}
FIGURES = ("frechet_distance", "prompt_accuracy", "diversity")


def run(out: Path, variant: str, seed: int) -> None:
    """Train and measure one student, unless its file is there already."""
    file = out / f"{variant}-{seed}.json"
    settings = {**REDUCED, **VARIANTS[variant], "training.seed": str(seed)}
    if is_done(file, settings):
        return
    folder = out / f"{variant}-{seed}"
    overrides = [*settings.items(), ("output.directory", str(folder))]
    result = train(load(preset="demo", overrides=overrides).config)
    components = load_teacher()
    unet, recipe = shared_unet_with_lora(components.unet, result.lora)
    assert recipe is not None
    student = {"student": System(role=STUDENT, plan=recipe.plan())}
    figures = asdict(measure_systems(unet, components, student, **SEEDS)["student"])
    write(file, {"settings": settings, "train_seconds": round(result.seconds), **figures})


def measure_teacher(out: Path, name: str) -> None:
    file, settings = out / f"{name}.json", {"guidance": str(TEACHERS[name])}
    if is_done(file, settings):
        return
    components = load_teacher()
    system = System(role=TEACHER, plan=StepPlan.evenly(50), strength=0.0, guidance=TEACHERS[name])
    unet = SharedUNet(components.unet, {}, seed=0)
    figures = asdict(measure_systems(unet, components, {name: system}, **SEEDS)[name])
    write(file, {"settings": settings, **figures})


def is_done(file: Path, settings: Mapping[str, str]) -> bool:
    """ValueError where the file tells of other settings under this name."""
    if not file.exists():
        return False
    if json.loads(file.read_text(encoding="utf-8"))["settings"] != settings:
        raise ValueError(f"{file} is of other settings than these: {dict(settings)}; remove it.")
    return True


def write(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(out: Path) -> str:
    """All that the folder holds, as Markdown: mean and sample standard deviation over seeds."""
    lines = [
        "| run | seeds | Frechet distance | prompt accuracy | diversity | seconds |",
        "|---|---|---|---|---|---|",
    ]
    names = {name: sorted(out.glob(f"{name}.json")) for name in TEACHERS}
    names |= {name: sorted(out.glob(f"{name}-[0-9]*.json")) for name in VARIANTS}
    for name, files in names.items():
        if files:
            lines.append(row(name, [json.loads(file.read_text("utf-8")) for file in files]))
    return "\n".join(lines)


def row(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    cells = []
    for figure, digits in zip(FIGURES, (1, 3, 2), strict=True):
        values = [run[figure] for run in runs]
        spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.{digits}f}{spread}")
    seconds = [run["train_seconds"] for run in runs if "train_seconds" in run]
    cells.append(f"{statistics.mean(seconds):.0f}" if seconds else "")
    return f"| {name} | {len(runs)} | {' | '.join(cells)} |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the figures")
    parser.add_argument(
        "--variants", default=",".join(VARIANTS), help="names with commas; default: all of them"
    )
    parser.add_argument("--seeds", default="0,1,2", help="numbers with commas")
    parser.add_argument("--teachers", action="store_true", help="measure the teacher as well")
    arguments = parser.parse_args(argv)
    variants = [name for name in arguments.variants.split(",") if name]
    for name in variants:
        if name not in VARIANTS:
            parser.error(f"--variants has {name!r}; choose among {', '.join(VARIANTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    for seed in map(int, arguments.seeds.split(",")):
        for name in variants:
            run(arguments.out, name, seed)
    for name in TEACHERS if arguments.teachers else ():
        measure_teacher(arguments.out, name)
    print(table(arguments.out))


if __name__ == "__main__":
    main()
