"""Which options give a student the teacher's diversity back: short runs of the demo, measured.

    python -m benchmarks.diversity --out diversity_output
    python -m benchmarks.diversity --out diversity_output --variants paper,anchor --seeds 0,1,2

Each run is a training of about four minutes of one core. Stopped and started again, it goes on with
those that are missing, and prints the table of all that are there. Prompts and noise are others
than those on which the demo and the ablations report, since choices are made by these figures.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dmd2_core import StepPlan, derived_seed
from train_lora.demo.run import System
from train_lora.demo.teacher import load_teacher
from train_lora.models.roles import TEACHER, SharedUNet

from .ablation import BUDGET, SEEDS
from .demo_runs import (
    RESULT,
    Run,
    Seeds,
    Settings,
    mean_and_spread,
    measure,
    read_or_measure,
    run_all,
    train_and_measure,
)

VARIANTS: dict[str, Settings] = {
    "paper": {},
    "anchor 0.05": {"diversity_anchor.weight": "0.05"},
    "anchor 0.5": {"diversity_anchor.weight": "0.5"},
    "anchor 0.5 to 499": {"diversity_anchor.weight": "0.5", "diversity_anchor.timestep": "499"},
    "anchor 0.5 to 249": {"diversity_anchor.weight": "0.5", "diversity_anchor.timestep": "249"},
    "anchor 2 to 499": {"diversity_anchor.weight": "2", "diversity_anchor.timestep": "499"},
    "guidance above": {"distribution_matching.guidance_timesteps": "above"},
    "guidance apart": {"distribution_matching.guidance_timesteps": "apart"},
    "Jensen-Shannon": {"distribution_matching.divergence": "jensen-shannon"},
    "forward KL": {"distribution_matching.divergence": "forward-kl"},
    "GAN on the teacher": {"gan.features": "teacher"},
    "GAN on all layers": {"gan.layers": "all"},
    "R1": {"gan.r1_weight": "100"},
}
TEACHERS = {"teacher, guidance 2": 2.0, "teacher, guidance 5": 5.0}
"""In 50 steps; the students are distilled with guidance 2."""
OTHER_SEEDS = Seeds(prompts=derived_seed(103), noise=4321)
FIGURES = {"frechet_distance": 1, "prompt_accuracy": 3, "diversity": 2}
"""Name -> digits."""


def run_of(variant: str, seed: int) -> Run:
    return Run(variant=variant, seed=seed, settings={**BUDGET, **VARIANTS[variant]})


def teacher_figures(guidance: float) -> dict[str, float]:
    components = load_teacher()
    unet = SharedUNet(components.unet, {}, seed=0)
    system = System(role=TEACHER, plan=StepPlan.evenly(50), strength=0.0, guidance=guidance)
    return measure(unet, components, system, OTHER_SEEDS)


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Markdown: mean and sample standard deviation over the seeds of each row."""
    lines = [
        "| | runs | Frechet distance | prompt accuracy | diversity |",
        "|---|---|---|---|---|",
    ]
    for name, runs in rows.items():
        cells = [
            mean_and_spread([run[figure] for run in runs], digits)
            for figure, digits in FIGURES.items()
        ]
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--variants", default=",".join(VARIANTS), help="with commas; default: all")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="with commas")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        run = run_of(options.one[0], int(options.one[1]))
        train_and_measure(run, options.out, OTHER_SEEDS)
        return 0
    variants = [name for name in options.variants.split(",") if name]
    if unknown := set(variants) - set(VARIANTS):
        parser.error(f"--variants has {sorted(unknown)}; choose among {', '.join(VARIANTS)}")
    seeds = [int(seed) for seed in options.seeds.split(",")]
    runs = [run_of(name, seed) for seed in seeds for name in variants]
    run_all(runs, "benchmarks.diversity", options.out, options.workers)
    rows = {
        name: [read_or_measure(options.out / name, lambda g=guidance: teacher_figures(g))]
        for name, guidance in TEACHERS.items()
    }
    for name in VARIANTS:
        folders = sorted(options.out.glob(f"{name}/seed*/{RESULT}"))
        found = [run_of(name, int(f.parent.name.removeprefix("seed"))) for f in folders]
        if found:
            rows[name] = [run.result(options.out) for run in found]
    print(table(rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
