"""The paper's ablations on the embedded teacher; `make benchmark-ablation` writes docs/ablation.md.

    python -m benchmarks.ablation --out ablation_output
    python -m benchmarks.ablation --out ablation_output --write     # the document alone, again

Thirty trainings of about four minutes of one core each. Stopped and started again, it goes on with
those that are missing.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from .demo_runs import Run, Settings, run_all, train_and_measure

SEEDS = (0, 1, 2)
BUDGET = {
    "training.batch_size": "8",
    "training.iterations": "200",
    "validation.every": "0",
}
"""Half the demo's batch and fewer iterations: the same for all rows."""
ONE_STEP = {"sampling.steps": "1", "sampling.conditioning_timestep": "399"}

VARIANTS: dict[str, Settings] = {
    "full": {},
    "no GAN": {"gan.enabled": "false"},
    "no distribution matching": {"distribution_matching.enabled": "false"},
    "no backward simulation": {"backward_simulation.enabled": "false"},
    "critic 1:1": {"critic.updates_per_generator": "1"},
    "critic 5:1": {"critic.updates_per_generator": "5"},
    "1 step at 399": ONE_STEP,
    "1 step at 999": {"sampling.steps": "1"},
    "1 step, regression (DMD)": {
        **ONE_STEP,
        "training.objective": "dmd",
        "regression.num_pairs": "256",
        "regression.teacher_steps": "16",
    },
    "8 steps": {"sampling.steps": "8"},
}
WATCHED = ("critic 1:1", "critic 5:1")


def run_of(variant: str, seed: int, out: Path) -> Run:
    settings = {**BUDGET, **VARIANTS[variant]}
    if "training.objective" in settings:
        settings["regression.pairs"] = str(out / f"pairs_seed{seed}")
    return Run(variant=variant, seed=seed, settings=settings, watched=variant in WATCHED)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time")
    parser.add_argument("--write", action="store_true", help="no training, only the document")
    parser.add_argument("--one", nargs=2, metavar=("VARIANT", "SEED"), help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.one:
        train_and_measure(run_of(options.one[0], int(options.one[1]), options.out), options.out)
        return 0
    runs = [run_of(variant, seed, options.out) for seed in SEEDS for variant in VARIANTS]
    if not options.write:
        run_all(runs, "benchmarks.ablation", options.out, options.workers)
    from .ablation_document import write_document

    write_document(runs, options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
