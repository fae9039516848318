"""The ablation's rows are the settings that they name, and its verdicts follow from the figures."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.ablation import SEEDS, VARIANTS, run_of
from benchmarks.ablation_claims import CLAIMS, Claim
from benchmarks.ablation_document import stray
from benchmarks.demo_runs import LORA, Run, train
from train_lora.lora_files import read_lora
from train_lora.sampling import step_plan


def test_each_row_is_the_setting_that_it_names(tmp_path: Path) -> None:
    configs = {name: run_of(name, 1, tmp_path).config(tmp_path) for name in VARIANTS}
    plans = {name: step_plan(config) for name, config in configs.items()}
    assert [name for name, c in configs.items() if not c.gan.enabled] == [
        "no GAN",
        "1 step, regression (DMD)",
    ]
    assert [n for n, c in configs.items() if not c.distribution_matching.enabled] == [
        "no distribution matching"
    ]
    assert [n for n, c in configs.items() if not c.backward_simulation.enabled] == [
        "no backward simulation"
    ]
    ratios = {name: config.critic.updates_per_generator for name, config in configs.items()}
    assert (ratios["full"], ratios["critic 1:1"], ratios["critic 5:1"]) == (3, 1, 5)
    assert ratios["1 step, regression (DMD)"] == 1
    told = {name: plan.told(0) for name, plan in plans.items() if len(plan.timesteps) == 1}
    assert told == {
        "1 step at 399": 399,
        "1 step at 999": 999,
        "1 step, regression (DMD)": 399,
    }
    assert {len(plan.timesteps) for plan in plans.values()} == {1, 4, 8}
    assert {config.training.seed for config in configs.values()} == {1}
    assert len({config.training.iterations for config in configs.values()}) == 1


@pytest.mark.parametrize(
    ("good", "bad", "figure", "verdict"),
    [
        ([1, 2, 3], [2, 3, 4], "frechet_distance", "reproduced"),
        ([1, 2, 4], [2, 3, 3], "frechet_distance", "not measurable at this scale"),
        ([2, 3, 4], [1, 2, 4], "frechet_distance", "not reproduced"),
        ([2, 3, 4], [1, 2, 3], "prompt_accuracy", "reproduced"),
    ],
)
def test_verdicts_take_all_seeds(
    good: list[float], bad: list[float], figure: str, verdict: str
) -> None:
    claim = Claim(better="full", worse="no GAN", figure=figure, paper="")
    results = {"full": [{figure: v} for v in good], "no GAN": [{figure: v} for v in bad]}
    assert claim.verdict(results) == verdict
    unable = replace(claim, out_of_reach="too short")
    assert unable.verdict(results) == "not measurable at this scale: too short"


def test_a_drift_is_no_oscillation() -> None:
    assert stray([(4, 0.1), (8, 0.2), (12, 0.3), (16, 0.4)]) == pytest.approx(0, abs=1e-12)
    swings = [(0, 1.0), (1, 0.0), (2, 0.0), (3, 1.0)]  # the line is 0.5
    assert stray(swings) == pytest.approx(0.5)


def test_claims_speak_of_rows_that_are_run() -> None:
    assert {name for claim in CLAIMS for name in (claim.better, claim.worse)} <= set(VARIANTS)
    assert len(SEEDS) == 3


def test_a_run_exports_what_it_trained(tmp_path: Path) -> None:
    settings = {"training.batch_size": "2", "training.iterations": "4", "student.rank": "2"}
    settings |= {"validation.every": "0", "sampling.steps": "2"}
    run = Run(variant="small", seed=5, settings=settings)
    brightness = train(run.config(tmp_path), tmp_path / LORA, watched=True)
    assert [iteration for iteration, _ in brightness] == [4]
    assert 0 < brightness[0][1] < 1
    modules, recipe = read_lora(tmp_path / LORA)
    assert recipe is not None
    assert recipe.plan().timesteps == (999, 499)
    assert any(module.up.abs().max() > 0 for module in modules.values())
