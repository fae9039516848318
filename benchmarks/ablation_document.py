"""docs/ablation.md and its pictures, from the runs of `benchmarks.ablation`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from dmd2_core import StepPlan
from train_lora.demo.run import TEACHER_GUIDANCE, System, renderer
from train_lora.demo.teacher import load_teacher
from train_lora.export import shared_unet_with_lora
from train_lora.models.roles import STUDENT, TEACHER, SharedUNet
from train_lora.pictures import labelled_grid

from .ablation_claims import CLAIMS, PAPER_NAMES, Claim, Results
from .demo_runs import (
    LORA,
    Run,
    captions_condition,
    mean_and_spread,
    measure,
    read_or_measure,
    shown_captions,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
PAGE, SAMPLES, BRIGHTNESS = "ablation.md", "ablation_samples.jpg", "ablation_brightness.png"
NUM_SHOWN = 10
FIGURES = {"frechet_distance": 1, "patch_distance": 1, "prompt_accuracy": 3, "diversity": 1}
"""Name -> digits shown."""

PAPER_ROWS = {
    "full": "SDXL, 4 steps: FID 19.32, patch FID 20.86, CLIP 0.332",
    "no GAN": "26.90, 27.66, 0.328",
    "no distribution matching": "13.77, 27.96, 0.307",
    "no backward simulation": "20.66, 24.21, 0.332",
    "critic 1:1": "ImageNet, one step, no GAN, no regression: FID 3.48",
    "critic 5:1": "ImageNet, one step, no GAN: FID 2.61",
    "1 step at 399": "SDXL, one step: 19.01, 26.98, 0.336; ImageNet: FID 1.51",
    "1 step at 999": 'none ("artefacts")',
    "1 step, regression (DMD)": "ImageNet, DMD: FID 2.62",
    "8 steps": "none",
    "teacher, 50 steps": "SDXL, guidance 6: 19.36, 21.38, 0.332",
    "teacher, 4 steps": "none",
}
TEACHERS = {
    f"teacher, {steps} steps": System(
        role=TEACHER, plan=StepPlan.evenly(steps), strength=0.0, guidance=TEACHER_GUIDANCE
    )
    for steps in (50, 4)
}


def write_document(runs: Sequence[Run], out: Path) -> None:
    """Table, claims, brightness, samples; replaces what a former run wrote."""
    results: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        results.setdefault(run.variant, []).append(run.result(out))
    teachers = {name: [_teacher(system, out / name)] for name, system in TEACHERS.items()}
    draw_brightness(results, DOCS / BRIGHTNESS)
    draw_samples([run for run in runs if run.seed == 0], out, DOCS / SAMPLES)
    (DOCS / PAGE).write_text(page(results, teachers), encoding="utf-8")
    print(DOCS / PAGE)


def _teacher(system: System, folder: Path) -> dict[str, Any]:
    def figures() -> dict[str, float]:
        components = load_teacher()
        return measure(SharedUNet(components.unet, {}, seed=0), components, system)

    return read_or_measure(folder, figures)


def page(
    results: dict[str, list[dict[str, Any]]], teachers: dict[str, list[dict[str, Any]]]
) -> str:
    template = Path(__file__).with_name("ablation_page.md").read_text("utf-8")
    rows = {**teachers, **results}
    return template.format(
        table="\n".join(_row(name, found) for name, found in rows.items()),
        claims="\n".join(_claim(claim, results) for claim in CLAIMS),
        brightness="\n".join(_steadiness(name, found) for name, found in results.items()
                             if found[0]["brightness"]),
        seeds=len(results["full"]),
        minutes=round(sum(r["seconds"] for found in results.values() for r in found) / 60),
        samples=SAMPLES,
        curve=BRIGHTNESS,
    )  # fmt: skip


def _row(name: str, found: Sequence[dict[str, Any]]) -> str:
    cells = [
        mean_and_spread([r[figure] for r in found], digits) for figure, digits in FIGURES.items()
    ]
    return f"| {name} | {' | '.join(cells)} | {PAPER_ROWS[name]} |"


def _claim(claim: Claim, results: Results) -> str:
    figure = PAPER_NAMES[claim.figure]
    digits = FIGURES[claim.figure]
    gains = ", ".join(f"{gain:+.{digits}f}" for gain in claim.gains(results))
    verdict = claim.verdict(results)
    if verdict != "reproduced" and claim.why:
        verdict += f": {claim.why}"
    finding = f"{claim.better} better than {claim.worse} | {figure}: {claim.paper}"
    return f"| {finding} | {gains} | {verdict} |"


def _steadiness(name: str, found: Sequence[dict[str, Any]]) -> str:
    """Of each seed, before the learning rates fall: how far it strays, how much it moves."""
    early = [r["brightness"][: len(r["brightness"]) // 2] for r in found]
    strays = ", ".join(f"{stray(curve):.4f}" for curve in early)
    moves = [statistics.mean(abs(b[1] - a[1]) for a, b in pairwise(curve)) for curve in early]
    return f"| {name} | {strays} | {', '.join(f'{move:.4f}' for move in moves)} |"


def stray(curve: Sequence[Sequence[float]]) -> float:
    """Standard deviation of a curve of (x, y) around its own straight line."""
    xs, ys = zip(*curve, strict=True)
    line = statistics.linear_regression(xs, ys)
    return statistics.pstdev(y - line.slope * x for x, y in curve)


def draw_brightness(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 3.5), layout="constrained")
    watched = {name: found for name, found in results.items() if found[0]["brightness"]}
    for colour, (name, found) in zip(("C3", "C0"), watched.items(), strict=True):
        for number, result in enumerate(found):
            iterations, values = zip(*result["brightness"], strict=True)
            label = name if number == 0 else None
            axes.plot(iterations, values, color=colour, alpha=0.8, linewidth=1.2, label=label)
    axes.set_xlabel("iteration")
    axes.set_ylabel("mean brightness of samples")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_samples(runs: Sequence[Run], out: Path, path: Path) -> None:
    """The same prompts and noise through each variant's first seed, below the teacher's."""
    captions = shown_captions(NUM_SHOWN)
    components = load_teacher()
    condition = captions_condition(components, captions)
    unet = SharedUNet(components.unet, {}, seed=0)
    rows = [
        (name, renderer(unet, components, system, condition)()) for name, system in TEACHERS.items()
    ]
    for run in runs:
        unet, recipe = shared_unet_with_lora(load_teacher().unet, run.folder(out) / LORA)
        assert recipe is not None
        system = System(role=STUDENT, plan=recipe.plan())
        rows.append((run.variant, renderer(unet, components, system, condition)()))
    labelled_grid(rows, captions).save(path, quality=88)
